"""The training engine: device, optimizers, schedules, one loop for every cell, and the files of a run."""

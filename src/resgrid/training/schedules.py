"""The learning rate at every optimizer step, as a factor of the cell's own.

Drops by epoch and by step as in He et al. 2015 (arXiv 1512.03385, section 4.2), half a cosine as in
Loshchilov & Hutter 2017 (arXiv 1608.03983, equation 5), and Keras's time-based decay.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from resgrid.config import Constant, Cosine, Drop, Piecewise, Recipe


def lr_factor(recipe: Recipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The factor of the learning rate at `step`, counted from 0 over the whole run.

    schedule · warm-up / (1 + time_decay · step). The warm-up is He et al.'s for ResNet-110: its factor on
    the scheduled rate for its steps, and then the scheduled rate at once.
    """
    match recipe.schedule:
        case Constant():
            factor = 1.0
        case Drop(every_epochs=every_epochs, factor=drop):
            factor = drop ** (step // steps_per_epoch // every_epochs)
        case Piecewise(boundaries=boundaries, factors=factors):
            factor = factors[bisect_right(boundaries, step)]
        case Cosine(final_factor=final):
            factor = final + (1 - final) * (1 + math.cos(math.pi * step / total_steps)) / 2
    if step < recipe.warmup.steps:
        factor *= recipe.warmup.factor
    return factor / (1 + recipe.time_decay * step)

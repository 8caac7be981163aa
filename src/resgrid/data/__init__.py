"""Images: fetched, checked, read safely, made into arrays of 32x32x3, and batched on the device."""

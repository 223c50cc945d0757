"""Training: setup, resume, loop, checkpoints, metrics."""

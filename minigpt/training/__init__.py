"""Training: optimizers, schedule, the loop, checkpoints and exact resume."""

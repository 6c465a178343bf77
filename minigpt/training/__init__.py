"""From a corpus and a config to weights: optimizers, schedule, the loop, and exact resume."""

"""What a run reports besides its events: plans, curves, TensorBoard."""

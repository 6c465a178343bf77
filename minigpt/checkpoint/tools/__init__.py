"""What is done with checkpoints besides writing and reading them."""

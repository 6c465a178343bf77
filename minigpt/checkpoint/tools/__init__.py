"""Tools for checkpoints: download, list, inspect, average, and model cards."""

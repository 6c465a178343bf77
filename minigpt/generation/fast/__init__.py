"""Fast decoding: one step with few calls, compiled graphs, weight-only quantization."""

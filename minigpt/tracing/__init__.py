"""Tracing: recording, reading and showing which tokens each generated token attended to."""

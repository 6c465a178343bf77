"""Displays of a running command: progress, a status line, and the compilation of a model."""

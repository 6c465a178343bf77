"""Analyses that a trace can add to its rows."""

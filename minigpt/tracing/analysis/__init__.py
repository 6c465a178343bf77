"""What a trace can tell beyond its rows."""

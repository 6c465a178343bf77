"""Reports about a run: its plan, its memory and its loss curves."""

"""Models for comparison: recurrent networks."""

"""The three claims that are always made for attention, measured."""

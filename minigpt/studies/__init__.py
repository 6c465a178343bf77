"""Studies: architectures compared on one text, and textbook claims about attention measured."""

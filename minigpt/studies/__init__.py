"""Studies: architectures compared on one text, and textbook claims about attention measured."""

from minigpt.model_config import ARCHS, ATTENTIONS

VARIANTS = (*ATTENTIONS, *list(ARCHS)[1:])
"""Variants that can be compared: every attention score, and the recurrent architectures."""

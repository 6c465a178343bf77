"""The Transformer: torch only; no file is opened and nothing is printed here."""

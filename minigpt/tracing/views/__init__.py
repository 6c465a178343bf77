"""Views of a whole trace: text, matrix, heads, page, pictures."""

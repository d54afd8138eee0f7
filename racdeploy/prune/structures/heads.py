"""Attention heads: query heads, as many of each group, or whole groups with their key and value."""

STEP = "width"
LETTER = "Q"

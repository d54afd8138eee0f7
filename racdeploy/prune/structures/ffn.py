"""Feed-forward channels: inputs of the linear that ends the feed-forward part, and their rows."""

STEP = "width"
LETTER = "F"

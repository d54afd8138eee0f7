"""Whole blocks: those whose removal changes the model's last hidden states least."""

STEP = "blocks"

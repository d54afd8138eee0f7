"""Traces: the model's own chains of thought, as token ids."""

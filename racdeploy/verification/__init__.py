"""Verification: compare the exported model's answers with those of the dense model."""

"""Scorers: whether an answer is right, one file each."""

"""Scorers that judge an answer, one file each."""

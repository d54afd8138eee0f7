"""Structured pruning: units that are removed as a whole, their number, and their choice."""

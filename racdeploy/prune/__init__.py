"""Pruning: one walk over the blocks, one file per method."""

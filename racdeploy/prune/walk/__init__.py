"""Walks over the blocks, and what goes through them."""

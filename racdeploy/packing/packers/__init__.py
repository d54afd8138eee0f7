"""Packings, one file each."""

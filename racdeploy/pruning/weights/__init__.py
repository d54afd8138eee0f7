"""Weights of a linear: the choice of zeros, and the values and codes of the others."""

"""The weights of a linear: which become zeros, and which values and codes are left."""

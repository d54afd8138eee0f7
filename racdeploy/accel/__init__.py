"""Sparse kernels for stock engines, compiled on demand; what is not faster or cannot be proven stays on stock paths."""

"""Decoding with any engine: the contract, sampling, batching, and engines in child processes."""

"""Walks over the blocks of a model: hidden states, statistics and pruned linears of each."""

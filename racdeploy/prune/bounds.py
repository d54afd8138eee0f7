"""How much of a pruning is in memory at a time; imports nothing, so that a plan can ask."""

WINDOW_BYTES = 64 << 20
"""Of hidden states between two blocks; the rest is in a file."""
TOKENS_PER_BATCH = 4096
"""Of the sequences that go through a block together."""
EXPERT_BYTES = 2 << 30
"""Of sums over the tokens of experts; more experts need another pass of their block."""

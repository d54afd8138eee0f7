"""Memory bounds of a pruning; imports nothing, so that a plan can read them without torch."""

WINDOW_BYTES = 64 << 20
"""Hidden states between two blocks that stay in memory; the rest is in a file."""
TOKENS_PER_BATCH = 4096
"""Most tokens that pass through a block together."""
EXPERT_BYTES = 2 << 30
"""Sums over the tokens of experts; with more experts, their block takes another pass."""

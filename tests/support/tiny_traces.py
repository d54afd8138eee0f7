"""Traces of random tokens, of different lengths."""

from __future__ import annotations

import torch

from racdeploy.traces.trace import Trace


def make_trace(index: int, prompt: int, thinking: int, answer: int) -> Trace:
    """Return a trace of so many tokens, the same one for the same index."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 480, (prompt + thinking + answer,), generator=generator).tolist()
    return Trace(
        index,
        "gcd",
        f"q{index}",
        "1",
        tuple(ids[:prompt]),
        tuple(ids[prompt:]),
        thinking,
        thinking,
        False,
        True,
    )


TRACES = [make_trace(i, 5 + i, 9 + 2 * i, 4) for i in range(8)]

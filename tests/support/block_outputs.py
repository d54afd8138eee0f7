"""What a block of transformers passes on, in the form that a walk has it."""

from __future__ import annotations

from typing import Any

import torch


def take_states(output: Any) -> torch.Tensor:
    """Return the hidden states of a block's output, (B, T, D); where a token has several, side by
    side.
    """
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return torch.cat([*states], dim=-1) if states.ndim == 4 else states

"""Attention with sinks: each head's softmax sees one more key, of a score of its own and no value.

transformers computes it as a whole matrix of scores, which for a long trace fills the memory. Here
the sink is a key of zeros behind the others, so that torch's own kernels do it, some queries at a
time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

NAME = "racdeploy_sinks"
_MASK_VALUES = 1 << 23  # of all heads for some queries, in memory at a time


def register() -> str:
    """Tell transformers of this attention, and return the name that it has there."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    return NAME


def attend(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    s_aux: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return what T queries see, (B, T, H, K); S keys and values are there for each of G groups.

    ``attention_mask`` is true where a query sees a key, and ``s_aux`` the score of each head's
    sink.
    """
    H, T = query_BHTK.shape[1:3]
    groups, S = key_BGSK.shape[1:3]
    # X: all keys, and the sink
    key_BHXK, value_BHXK = (
        pad(each, (0, 0, 0, 1)).repeat_interleave(H // groups, dim=1)
        for each in (key_BGSK, value_BGSK)
    )
    sink_H11 = s_aux.to(query_BHTK.dtype)[:, None, None]

    outputs = []
    step = max(1, _MASK_VALUES // (H * (S + 1)))
    for start in range(0, T, step):
        stop = min(start + step, T)
        seen_B1XS = _see(attention_mask, start, stop, T, S, query_BHTK.device)

        score_BHXS = query_BHTK.new_zeros((len(seen_B1XS), H, stop - start, S + 1))
        score_BHXS[..., :S].masked_fill_(~seen_B1XS, -torch.inf)
        score_BHXS[..., S:] = sink_H11

        outputs.append(
            scaled_dot_product_attention(
                query_BHTK[:, :, start:stop],
                key_BHXK,
                value_BHXK,
                attn_mask=score_BHXS,
                scale=scaling,
            )
        )

    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _see(
    mask_B1TS: Tensor | None, start: int, stop: int, T: int, S: int, device: torch.device
) -> Tensor:
    """Return which keys some queries see; without a mask, those up to themselves."""
    if mask_B1TS is not None:
        return mask_B1TS[:, :, start:stop, :S]

    own_T = torch.arange(start, stop, device=device) + S - T  # of a cache, queries are the last
    seen_TS = torch.arange(S, device=device) <= own_T[:, None]
    return seen_TS[None, None]

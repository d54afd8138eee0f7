"""Attention with sinks: each head's softmax has one more key, with a learned score and no value.

transformers computes the whole score matrix, which fills the memory for a long trace. Here the sink
is a zero key behind the others, so that torch's fused attention computes it in chunks of queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

NAME = "racdeploy_sinks"
_MASK_VALUES = 1 << 23  # mask values of all heads in memory at a time


def register() -> str:
    """Register this attention in transformers; return its name there."""
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
    """Return the attention output of T queries, with shape (B, T, H, K).

    Args:
        key_BGSK: S keys of each of G groups of heads; ``value_BGSK`` likewise.
        attention_mask: True where a query sees a key.
        s_aux: score of each head's sink.
    """
    H, T = query_BHTK.shape[1:3]
    groups, S = key_BGSK.shape[1:3]
    # X: all keys, and behind them the sink: a key and a value of zeros.
    key_BHXK = pad(key_BGSK, (0, 0, 0, 1)).repeat_interleave(H // groups, dim=1)
    value_BHXK = pad(value_BGSK, (0, 0, 0, 1)).repeat_interleave(H // groups, dim=1)
    sink_H11 = s_aux.to(query_BHTK.dtype)[:, None, None]

    # The mask carries the sink's score, since the product with a zero key is 0.
    outputs = []
    step = max(1, _MASK_VALUES // (H * (S + 1)))
    for start in range(0, T, step):
        stop = min(start + step, T)
        visible_B1XS = _visible_keys(
            attention_mask, start, stop, T=T, S=S, device=query_BHTK.device
        )

        score_BHXS = query_BHTK.new_zeros((len(visible_B1XS), H, stop - start, S + 1))
        score_BHXS[..., :S].masked_fill_(~visible_B1XS, -torch.inf)
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


def _visible_keys(
    mask_B1TS: Tensor | None,
    start: int,
    stop: int,
    *,
    T: int,
    S: int,
    device: torch.device,
) -> Tensor:
    """Return the mask of keys that some queries see; without a mask, keys up to themselves."""
    if mask_B1TS is not None:
        return mask_B1TS[:, :, start:stop, :S]

    # With a cache, queries are its last tokens.
    position_T = torch.arange(start, stop, device=device) + S - T
    visible_TS = torch.arange(S, device=device) <= position_T[:, None]
    return visible_TS[None, None]

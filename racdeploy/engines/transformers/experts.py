"""Experts as modules of their own, under the names of the checkpoint, whatever transformers does.

transformers 5 lays the matrices of all experts of a block into one tensor, and transformers 4 calls
each by itself. Here both are the same: every expert is three linears, filled from the file and
pruned one by one, and what the router chose reaches all of them in one call, which hooks can see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Activation = Callable[[torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """A feed-forward part with a gate: D hidden values of a token, F inside."""

    def __init__(self, D: int, F: int, activation: Activation) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)
        self._activation = activation

    def inner(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return what reaches ``down_proj``."""
        gate_NF = self._activation(self.gate_proj(hidden_ND))
        inner_NF: torch.Tensor = gate_NF * self.up_proj(hidden_ND)
        return inner_NF

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.inner(hidden_ND))
        return result


class Experts(nn.ModuleList):
    """Stands for transformers' fused experts, with their signature."""

    def forward(
        self, hidden_ND: torch.Tensor, chosen_NK: torch.Tensor, share_NK: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum over the K experts that each token chose, each by its share."""
        output_ND = torch.zeros_like(hidden_ND)
        for index, expert in enumerate(self):
            token_M, place_M = torch.where(chosen_NK == index)
            if len(token_M):
                found_MD = expert(hidden_ND[token_M]) * share_NK[token_M, place_M, None]
                output_ND.index_add_(0, token_M, found_MD.to(output_ND.dtype))
        return output_ND


class Mixture(nn.Module):
    """Stands for the part of a block in transformers 4 that routes tokens to its experts."""

    def __init__(self, theirs: Any, experts: Experts) -> None:
        super().__init__()
        self.gate, self.experts = theirs.gate, experts
        self._K, self._normed = theirs.top_k, theirs.norm_topk_prob

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_ND = hidden_BTD.view(-1, hidden_BTD.shape[-1])
        logits_NE = self.gate(hidden_ND)
        chosen_NK, share_NK = route(logits_NE, self._K, normed=self._normed)
        output_ND: torch.Tensor = self.experts(hidden_ND, chosen_NK, share_NK.to(logits_NE.dtype))
        return output_ND.view(hidden_BTD.shape)


def route(logits_NE: torch.Tensor, K: int, *, normed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K experts that each token chooses, and their shares.

    Where a logit is minus infinity, the router is without that expert. ``normed``: shares of a
    token add up to 1.
    """
    share_NE = torch.softmax(logits_NE, dim=1, dtype=torch.float)
    share_NK, chosen_NK = torch.topk(share_NE, K, dim=-1)
    if normed:
        share_NK = share_NK / share_NK.sum(dim=-1, keepdim=True)
    return chosen_NK, share_NK


def part_experts(model: nn.Module) -> None:
    """Replace every group of experts of a model on the meta device."""
    for name, module in list(model.named_modules()):
        listed = getattr(module, "experts", None)
        if {"gate_up_proj", "down_proj"} <= dict(module.named_parameters(recurse=False)).keys():
            model.set_submodule(name, _part(module))
        elif isinstance(listed, nn.ModuleList):
            model.set_submodule(name, Mixture(module, _rebuild(listed)))


def _part(fused: Any) -> Experts:
    E, D, F = fused.down_proj.shape
    return Experts([Expert(D, F, fused.act_fn) for _ in range(E)])


def _rebuild(listed: nn.ModuleList) -> Experts:
    first: Any = listed[0]
    D, F = first.down_proj.weight.shape
    return Experts([Expert(D, F, first.act_fn) for _ in listed])

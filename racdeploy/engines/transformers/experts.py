"""Experts as modules of their own, under the names of the checkpoint, whatever transformers does.

transformers 5 lays the matrices of all experts of a block into one tensor. Apart again, each is a
linear: filled from the file, seen by hooks with the tokens routed to it, and pruned.
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

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        inner_NF = self._activation(self.gate_proj(hidden_ND)) * self.up_proj(hidden_ND)
        result: torch.Tensor = self.down_proj(inner_NF)
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


def part_experts(model: nn.Module) -> None:
    """Replace every fused group of experts of a model on the meta device."""
    for name, fused in list(model.named_modules()):
        if {"gate_up_proj", "down_proj"} <= dict(fused.named_parameters(recurse=False)).keys():
            model.set_submodule(name, _part(fused))


def _part(fused: Any) -> Experts:
    E, D, F = fused.down_proj.shape
    return Experts([Expert(D, F, fused.act_fn) for _ in range(E)])

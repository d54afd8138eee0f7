"""Experts as modules of their own, under the names of the checkpoint, whatever transformers does.

transformers 5 lays the matrices of all experts of a block into one tensor, and transformers 4 calls
each by itself. Here both are the same: every expert is three linears, filled from the file and
pruned one by one, and what the router chose reaches all of them in one call, which hooks can see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_TELLS_LOGITS = transformers.__version__.startswith(
    "4."
)  # the router of Granite, beside the output
Activation = Callable[[Tensor], Tensor]
Gating = Callable[[Tensor, Tensor], Tensor]
"""Returns what of F values of the gate and F others goes on."""


class Expert(nn.Module):
    """A feed-forward part with a gate: D hidden values of a token, F inside."""

    def __init__(self, D: int, F: int, gating: Gating, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, F, bias=bias)
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)
        self._gating = gating

    def inner(self, hidden_ND: Tensor) -> Tensor:
        """Return what reaches ``down_proj``."""
        return self._gating(self.gate_proj(hidden_ND), self.up_proj(hidden_ND))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.inner(hidden_ND))
        return result


class Experts(nn.ModuleList):
    """Stands for transformers' fused experts, with their signature."""

    def forward(self, hidden_ND: Tensor, chosen_NK: Tensor, share_NK: Tensor) -> Tensor:
        """Return the sum over the K experts that each token chose, each by its share."""
        output_ND = torch.zeros_like(hidden_ND)
        for index, expert in enumerate(self):
            token_M, place_M = torch.where(chosen_NK == index)
            if len(token_M):
                found_MD = expert(hidden_ND[token_M]) * share_NK[token_M, place_M, None]
                output_ND.index_add_(0, token_M, found_MD.to(output_ND.dtype))
        return output_ND


class _Routed(nn.Module):
    """A part of a block that routes each token to K of its experts."""

    experts: Experts
    _K: int
    _normed = True

    def _mix(self, hidden_ND: Tensor, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over the chosen experts, and the shares of these."""
        chosen_NK, share_NK = route(logits_NE, self._K, normed=self._normed)
        share_NK = share_NK.to(logits_NE.dtype)
        return self.experts(hidden_ND, chosen_NK, share_NK), share_NK


class Mixture(_Routed):
    """Stands for the part of a block in transformers 4 that routes tokens to its experts."""

    def __init__(self, theirs: Any, experts: Experts) -> None:
        super().__init__()
        self.gate, self.experts = theirs.gate, experts
        self._K, self._normed = theirs.top_k, theirs.norm_topk_prob

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_ND = hidden_BTD.view(-1, hidden_BTD.shape[-1])
        output_ND, _ = self._mix(hidden_ND, self.gate(hidden_ND))
        return output_ND.view(hidden_BTD.shape)


class GptOssMixture(_Routed):
    """Stands for GPT-OSS's router and experts, which each release of transformers calls its way."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        fused = theirs.experts
        E, F, D = fused.down_proj.shape
        gating = partial(gate_clamped, alpha=fused.alpha, limit=fused.limit)

        self.router = theirs.router
        self.experts = Experts([Expert(D, F, gating, bias=True) for _ in range(E)])
        self._K = theirs.router.top_k

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over the chosen experts, and the shares of these."""
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        logits_NE = nn.functional.linear(hidden_ND, self.router.weight, self.router.bias)
        output_ND, share_NK = self._mix(hidden_ND, logits_NE)
        return output_ND.view(hidden_BTD.shape), share_NK


class GraniteRouter(nn.Module):
    """The router of Granite under its published name."""

    def __init__(self, D: int, E: int) -> None:
        super().__init__()
        self.layer = nn.Linear(D, E, bias=False)


class GraniteMixture(_Routed):
    """Stands for the part of Granite's blocks that routes tokens to experts."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        fused = getattr(theirs, "output_linear", None)  # up to transformers 5.8
        if fused is not None:
            (E, D, F), activation = fused.weight.shape, theirs.activation
        else:
            (E, D, F), activation = theirs.experts.down_proj.shape, theirs.experts.act_fn

        self.router = GraniteRouter(D, E)
        self.experts = Experts([Expert(D, F, _gate_by(activation)) for _ in range(E)])
        self._K = theirs.router.top_k

    def forward(self, hidden_BTD: Tensor) -> Any:
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        logits_NE = self.router.layer(hidden_ND)
        output_ND, _ = self._mix(hidden_ND, logits_NE)
        output_BTD = output_ND.view(hidden_BTD.shape)
        return (output_BTD, logits_NE) if _TELLS_LOGITS else output_BTD


def gate_clamped(gate_NF: Tensor, up_NF: Tensor, *, alpha: float, limit: float) -> Tensor:
    """Return SwiGLU of values that are cut off, where what is gated is one more than it says."""
    gate_NF = gate_NF.clamp(max=limit)
    up_NF = up_NF.clamp(-limit, limit)
    return (up_NF + 1) * gate_NF * torch.sigmoid(alpha * gate_NF)


def route(logits_NE: Tensor, K: int, *, normed: bool) -> tuple[Tensor, Tensor]:
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
        own = dict(module.named_parameters(recurse=False)).keys()
        if hasattr(listed, "gate_up_proj_bias"):
            model.set_submodule(name, GptOssMixture(module))
        elif name.endswith(".block_sparse_moe"):
            model.set_submodule(name, GraniteMixture(module))
        elif {"gate_up_proj", "down_proj"} <= own and "gate_up_proj_bias" not in own:
            model.set_submodule(name, _part(module))
        elif isinstance(listed, nn.ModuleList):
            model.set_submodule(name, Mixture(module, _rebuild(listed)))


def _part(fused: Any) -> Experts:
    E, D, F = fused.down_proj.shape
    return Experts([Expert(D, F, _gate_by(fused.act_fn)) for _ in range(E)])


def _rebuild(listed: nn.ModuleList) -> Experts:
    first: Any = listed[0]
    D, F = first.down_proj.weight.shape
    return Experts([Expert(D, F, _gate_by(first.act_fn)) for _ in listed])


def _gate_by(activation: Activation) -> Gating:
    def gating(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        return activation(gate_NF) * up_NF

    return gating

"""Experts as separate modules under the checkpoint's names, in transformers 4 and 5.

transformers 5 fuses the matrices of all experts of a block into one tensor, transformers 4 calls
each expert by itself. Here every expert has linears of its own, filled from the file and pruned one
by one. All experts of a block are called together with the router's choice, so that hooks see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# In transformers 4, Granite's blocks return router logits beside the output.
_RETURNS_LOGITS = transformers.__version__.startswith("4.")
Activation = Callable[[Tensor], Tensor]
GatedActivation = Callable[..., Tensor]
"""Combines F values of the gate projection, if there is one, with F of the up projection."""


class Expert(nn.Module):
    """A feed-forward network with D hidden and F intermediate values a token.

    Args:
        names: of its linears in the checkpoint, as gate, up and down; the last gives the output.
    """

    def __init__(
        self, D: int, F: int, names: Sequence[str], gating: GatedActivation, *, bias: bool = False
    ) -> None:
        super().__init__()
        *self._inputs, self.last = names
        for name in self._inputs:
            self.add_module(name, nn.Linear(D, F, bias=bias))
        self.add_module(self.last, nn.Linear(F, D, bias=bias))
        self._gating = gating

    def intermediate(self, hidden_ND: Tensor) -> Tensor:
        """Return the intermediate values, the input of the last linear."""
        return self._gating(*(self.get_submodule(name)(hidden_ND) for name in self._inputs))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(self.last)(self.intermediate(hidden_ND))
        return result


class Experts(nn.ModuleList):
    """Separate experts with the signature of transformers' fused experts."""

    def forward(self, hidden_ND: Tensor, chosen_NK: Tensor, share_NK: Tensor) -> Tensor:
        """Return the weighted sum over the K experts of each token."""
        output_ND = torch.zeros_like(hidden_ND)
        for index, expert in enumerate(self):
            token_M, rank_M = torch.where(chosen_NK == index)
            if len(token_M):
                weighted_MD = expert(hidden_ND[token_M]) * share_NK[token_M, rank_M, None]
                output_ND.index_add_(0, token_M, weighted_MD.to(output_ND.dtype))
        return output_ND


class _Routed(nn.Module):
    """Base of the sparse blocks: each token is routed to K experts."""

    experts: Experts
    _K: int
    _norm_topk_prob = True

    def _mix(
        self, hidden_BTD: Tensor, router: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sum over the chosen experts, their weights, and all logits."""
        hidden_ND = hidden_BTD.flatten(0, 1)
        logits_NE = router(hidden_ND)
        chosen_NK, share_NK = route(logits_NE, self._K, norm_topk_prob=self._norm_topk_prob)
        share_NK = share_NK.to(logits_NE.dtype)
        output_ND = self.experts(hidden_ND, chosen_NK, share_NK)
        return output_ND.view(hidden_BTD.shape), share_NK, logits_NE


class SparseMoeBlock(_Routed):
    """Replaces the sparse blocks of transformers 4 that have a list of experts."""

    def __init__(self, original: Any, experts: Experts) -> None:
        super().__init__()
        self.gate, self.experts = original.gate, experts
        self._K, self._norm_topk_prob = original.top_k, original.norm_topk_prob

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        output_BTD, _, _ = self._mix(hidden_BTD, self.gate)
        return output_BTD


class GptOssMoeBlock(_Routed):
    """Replaces GPT-OSS's router and experts, whose calls differ between transformers' releases."""

    def __init__(self, original: Any, names: Sequence[str]) -> None:
        super().__init__()
        fused = original.experts
        E, F, D = fused.down_proj.shape
        gating = partial(clamped_swiglu, alpha=fused.alpha, limit=fused.limit)

        self.router = original.router
        self.experts = Experts([Expert(D, F, names, gating, bias=True) for _ in range(E)])
        self._K = original.router.top_k

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum over the chosen experts, and their weights."""
        weight_ED, bias_E = self.router.weight, self.router.bias
        router = partial(nn.functional.linear, weight=weight_ED, bias=bias_E)
        output_BTD, share_NK, _ = self._mix(hidden_BTD, router)
        return output_BTD, share_NK


class GraniteRouter(nn.Module):
    """Granite's router under its name in the checkpoint."""

    def __init__(self, D: int, E: int) -> None:
        super().__init__()
        self.layer = nn.Linear(D, E, bias=False)


class GraniteMoeBlock(_Routed):
    """Replaces the sparse blocks of Granite."""

    def __init__(self, original: Any, names: Sequence[str]) -> None:
        super().__init__()
        fused = getattr(original, "output_linear", None)  # up to transformers 5.8
        if fused is not None:
            E, D, F = fused.weight.shape
            activation = original.activation
        else:
            E, D, F = original.experts.down_proj.shape
            activation = original.experts.act_fn

        self.router = GraniteRouter(D, E)
        self.experts = _make_experts(E, D, F, names=names, activation=activation)
        self._K = original.router.top_k

    def forward(self, hidden_BTD: Tensor) -> Any:
        output_BTD, _, logits_NE = self._mix(hidden_BTD, self.router.layer)
        return (output_BTD, logits_NE) if _RETURNS_LOGITS else output_BTD


def clamped_swiglu(gate_NF: Tensor, up_NF: Tensor, *, alpha: float, limit: float) -> Tensor:
    """Return GPT-OSS's SwiGLU: both inputs are clamped, and 1 is added to the up projection."""
    gate_NF = gate_NF.clamp(max=limit)
    up_NF = up_NF.clamp(-limit, limit)
    return (up_NF + 1) * gate_NF * torch.sigmoid(alpha * gate_NF)


def route(
    logits_NE: Tensor,
    K: int,
    *,
    norm_topk_prob: bool,
    bias_E: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the K experts of each token, and their weights.

    A logit of minus infinity removes an expert. With ``norm_topk_prob``, the weights of a token add
    up to the scale. Where a bias joins in the choice, weights are sigmoids, as in DeepSeek V3.
    """
    if bias_E is None:
        share_NE = torch.softmax(logits_NE, dim=1, dtype=torch.float)
        score_NE = share_NE
    else:
        share_NE = torch.sigmoid(logits_NE)
        score_NE = (share_NE + bias_E).masked_fill(logits_NE.isneginf(), -torch.inf)

    chosen_NK = torch.topk(score_NE, K, dim=-1).indices
    share_NK = share_NE.gather(1, chosen_NK)
    if norm_topk_prob:
        share_NK = share_NK / share_NK.sum(dim=-1, keepdim=True)
    return chosen_NK, share_NK * scale


def unfuse_experts(model: nn.Module, linears: Sequence[str]) -> None:
    """Replace all fused or listed experts of a model on the meta device by separate ones.

    Args:
        linears: of an expert, as a family lists them.
    """
    leaves = [linear.rpartition(".")[2] for linear in linears]
    for name, module in list(model.named_modules()):
        experts = getattr(module, "experts", None)
        names = dict(module.named_parameters(recurse=False)).keys()
        if hasattr(experts, "gate_up_proj_bias"):
            model.set_submodule(name, GptOssMoeBlock(module, leaves))
        elif name.endswith(".block_sparse_moe"):
            model.set_submodule(name, GraniteMoeBlock(module, leaves))
        elif "down_proj" in names and "gate_up_proj_bias" not in names:
            E, D, F = module.get_parameter("down_proj").shape
            separate = _make_experts(E, D, F, names=leaves, activation=module.act_fn)
            model.set_submodule(name, separate)
        elif isinstance(experts, nn.ModuleList):
            first: Any = experts[0]
            D, F = first.down_proj.weight.shape
            separate = _make_experts(len(experts), D, F, names=leaves, activation=first.act_fn)
            model.set_submodule(name, SparseMoeBlock(module, separate))


def _make_experts(
    E: int, D: int, F: int, *, names: Sequence[str], activation: Activation
) -> Experts:
    def gating(first_NF: Tensor, *up_NF: Tensor) -> Tensor:
        return math.prod(up_NF, start=activation(first_NF))

    return Experts([Expert(D, F, names, gating) for _ in range(E)])

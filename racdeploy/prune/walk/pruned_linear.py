"""A linear that was pruned: its weights, what they were solved for, and how far off they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from racdeploy.prune.processes import Processes
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.held_out import RelativeError
from racdeploy.results.pruning import LinearRow


@dataclass(frozen=True)
class PrunedLinear:
    """A pruned linear."""

    stored_OI: torch.Tensor  # weights in the file's dtype
    target_OI: torch.Tensor  # dense weights, or what gives the dense output on the drifted input
    damping: float
    error: RelativeError  # on held-out traces, against the target
    importance_I: torch.Tensor  # mean squared input
    tokens: int
    routed: int | None  # calibration tokens of the expert that it belongs to
    pooled: bool  # whether those of all experts decided

    def spread(self, processes: Processes, owner: int, *, target: bool) -> PrunedLinear:
        """Return the linear as its owner has it; the targets are all the same unless ``target``."""
        return replace(
            self,
            stored_OI=processes.spread(self.stored_OI, owner),
            target_OI=processes.spread(self.target_OI, owner) if target else self.target_OI,
            damping=processes.tell(self.damping, owner),
        )

    def row(self, name: str, sparsity: float, quant: str) -> LinearRow:
        reached = float((self.stored_OI == 0).float().mean())
        rounded = quant and reached > sparsity
        reason = f"codes of {quant} rounded to zero" if rounded else ""

        return LinearRow(
            name=name,
            sparsity_asked=sparsity,
            sparsity_reached=reached,
            reason=reason,
            held_out_error=self.error.total,
            error_by_stream=self.error.by_stream,
            damping=self.damping,
            tokens=self.routed,
            pooled=self.pooled,
        )


@contextmanager
def remember_outputs(block: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dict that fills with the outputs of some linears while the body runs."""
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str, module: nn.Module, _: Any, output_BTO: torch.Tensor) -> None:
        outputs[name] = without_bias(module, output_BTO)

    with ExitStack() as hooks:
        for name in names:
            hook = partial(remember, name)
            hooks.enter_context(block.get_submodule(name).register_forward_hook(hook))
        yield outputs


@contextmanager
def measure_outputs(
    block: nn.Module,
    pruned: Mapping[str, PrunedLinear],
    batch: Batch,
    dense: Mapping[str, torch.Tensor],
) -> Iterator[None]:
    """While the body runs, compare each pruned linear's output with that of its target.

    ``dense``: outputs of the dense model, for linears that had more inputs there.
    """
    with ExitStack() as hooks:
        for name, linear in pruned.items():
            hook = partial(_add_error, linear, batch, dense.get(name))
            hooks.enter_context(block.get_submodule(name).register_forward_hook(hook))
        yield


def _add_error(
    linear: PrunedLinear,
    batch: Batch,
    wanted_BTO: torch.Tensor | None,
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output_BTO: torch.Tensor,
) -> None:
    found_BTO = without_bias(module, output_BTO)
    if wanted_BTO is None:
        wanted_BTO = inputs[0].float() @ linear.target_OI.T
    linear.error.add(found_BTO.float(), wanted_BTO.float(), batch)


def without_bias(module: nn.Module, output_BTO: torch.Tensor) -> torch.Tensor:
    """Return the output of a linear as its matrix alone makes it."""
    bias = getattr(module, "bias", None)
    return output_BTO if bias is None else output_BTO - bias

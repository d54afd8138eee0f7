"""A linear that was pruned: its weights, what they were solved for, and how far off they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from racdeploy.prune.batches import Batch
from racdeploy.prune.held_out import RelativeError
from racdeploy.prune.processes import Processes
from racdeploy.report.model import LinearRow


@dataclass(frozen=True)
class PrunedLinear:
    """A pruned linear in the file's dtype, what it was solved for, its error, and how large its inputs are."""

    stored_OI: torch.Tensor
    target_OI: torch.Tensor
    damping: float
    error: RelativeError
    importance_I: torch.Tensor
    tokens: int

    def spread(self, processes: Processes, owner: int, target: bool) -> PrunedLinear:
        """Return the linear as its owner has it; tensors are overwritten, the target's only where they differ."""
        if processes.count == 1:
            return self
        stored_OI, target_OI = (
            self.stored_OI.clone(),
            self.target_OI.clone() if target else self.target_OI,
        )
        processes.spread(stored_OI, owner)
        if target:
            processes.spread(target_OI, owner)
        return replace(
            self,
            stored_OI=stored_OI,
            target_OI=target_OI,
            damping=processes.tell(self.damping, owner),
        )

    def row(self, name: str, sparsity: float, quant: str) -> LinearRow:
        reached = float((self.stored_OI == 0).float().mean())
        return LinearRow(
            name=name,
            sparsity_asked=sparsity,
            sparsity_reached=reached,
            reason=f"codes of {quant} rounded to zero" if quant and reached > sparsity else "",
            held_out_error=self.error.total,
            error_by_stream=self.error.by_stream,
            damping=self.damping,
        )


def importance(prefix: str, pruned: Mapping[str, PrunedLinear]) -> dict[str, torch.Tensor]:
    """Return the mean squared inputs by the weight's name, and on how many tokens they rest."""
    tensors: dict[str, torch.Tensor] = {}
    for name, row in pruned.items():
        tensors[f"{prefix}.{name}.weight"] = (
            row.importance_I.cpu().clone()
        )  # linears of a group share it
        tensors[f"{prefix}.{name}.weight.tokens"] = torch.tensor([row.tokens], dtype=torch.float64)
    return tensors


@contextmanager
def measured(block: nn.Module, pruned: Mapping[str, PrunedLinear], batch: Batch) -> Iterator[None]:
    """While the body runs, compare each pruned linear's output with that of the weights it was solved for."""

    def observer(
        linear: PrunedLinear,
    ) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def observe(
            module: nn.Module, inputs: tuple[torch.Tensor, ...], output_BTO: torch.Tensor
        ) -> None:
            bias = getattr(module, "bias", None)
            found_BTO = output_BTO if bias is None else output_BTO - bias
            linear.error.add(found_BTO.float(), inputs[0].float() @ linear.target_OI.T, batch)

        return observe

    handles = [
        block.get_submodule(name).register_forward_hook(observer(linear))
        for name, linear in pruned.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""A pruned linear: its weights, their target and their held-out error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.relative_error import RelativeError
from racdeploy.pruning.walk.work_share import WorkShare
from racdeploy.quant.grid import GridCodes
from racdeploy.results.pruning import LinearRow


@dataclass(frozen=True)
class PrunedLinear:
    """Weights of a pruned linear, with what its report row needs."""

    stored_OI: Tensor  # weights in the file's dtype
    target_OI: Tensor  # dense weights, or those solved for the dense output
    damping: float
    error: RelativeError  # on held-out traces, against the target
    importance_I: Tensor  # mean squared input
    tokens: int
    expert_tokens: int | None  # calibration tokens of its expert; None outside of experts
    pooled: bool  # pruned on the tokens of all experts
    quant: str  # number format of its codes, where they are chosen, or empty
    codes: GridCodes | None  # of stored_OI

    def of_owner(self, share: WorkShare, name: str, *, target: bool) -> PrunedLinear:
        """Return the linear of the process that owns it.

        Args:
            name: its name in the share.
            target: also take the target; without it every process has the dense weights.
        """
        return replace(
            self,
            stored_OI=share.get_tensor(name, self.stored_OI),
            target_OI=share.get_tensor(name, self.target_OI) if target else self.target_OI,
            damping=share.get_object(name, self.damping),
            codes=share.get_object(name, self.codes),
        )

    def to_row(self, name: str, sparsity: float) -> LinearRow:
        actual_sparsity = float((self.stored_OI == 0).float().mean())
        rounded = self.quant and actual_sparsity > sparsity
        reason = f"codes of {self.quant} rounded to zero" if rounded else ""

        return LinearRow(
            name=name,
            requested_sparsity=sparsity,
            actual_sparsity=actual_sparsity,
            reason=reason,
            held_out_error=self.error.total,
            damping=self.damping,
            tokens=self.expert_tokens,
            pooled=self.pooled,
        )


@contextmanager
def record_outputs(block: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that collects the outputs of some linears, without their biases."""
    outputs: dict[str, Tensor] = {}

    def remember(name: str, module: nn.Module, _: Any, output_BTO: Tensor) -> None:
        outputs[name] = subtract_bias(module, output_BTO)

    with _observe(block, names, remember):
        yield outputs


def measure_outputs(
    block: nn.Module,
    pruned: Mapping[str, PrunedLinear],
    batch: Batch,
    dense: Mapping[str, Tensor],
) -> AbstractContextManager[None]:
    """Within the context, add each pruned linear's output to its error against the target.

    ``dense``: outputs of the dense model, the targets of linears that lost inputs in a cut.
    """

    def add_error(name: str, module: nn.Module, inputs: Any, output_BTO: Tensor) -> None:
        product_BTO = subtract_bias(module, output_BTO)
        dense_BTO = dense.get(name)
        if dense_BTO is None:
            dense_BTO = inputs[0].float() @ pruned[name].target_OI.T
        pruned[name].error.add(product_BTO.float(), dense_BTO.float(), batch)

    return _observe(block, pruned, add_error)


@contextmanager
def _observe(
    block: nn.Module, names: Iterable[str], observe: Callable[..., None]
) -> Iterator[None]:
    """Within the context, call ``observe(name, module, inputs, output)`` for each linear's call."""
    with ExitStack() as hooks:
        for name in names:
            hook = partial(observe, name)
            hooks.enter_context(block.get_submodule(name).register_forward_hook(hook))
        yield


def subtract_bias(module: nn.Module, output_BTO: Tensor) -> Tensor:
    """Return the output of a linear minus its bias: pruning changes the matrix alone."""
    bias = getattr(module, "bias", None)
    return output_BTO if bias is None else output_BTO - bias

"""A model sharded over processes with FSDP2: each process has some rows of every weight.

A block is gathered while it is computed, and so is its gradient, which is then summed over the
processes. The optimizer sees this process's rows, as plain tensors.

Source: FSDP2, ``torch.distributed.fsdp.fully_shard``, after Zhao et al. 2023 (arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp

from racdeploy.engines.backends.transformers.torch_model import build_skeleton, fill_parameter
from racdeploy.errors import EnvironmentFailure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tensor_coverage import check_tensors
from racdeploy.pruning.process_group import ProcessGroup

_SUM_REDUCTION = "set_force_sum_reduction_for_comms"
_UNUSED_PARAMETERS = "set_reduce_scatter_unused_params"


class ShardedModel:
    """Sharded model with this process's rows of the trained weights.

    ``model`` has no output projection.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        trained: Sequence[str],
        device: torch.device,
        processes: ProcessGroup,
    ) -> None:
        self._processes = processes
        self._routed = bool(checkpoint.family.expert_linears)
        self.model = _load(checkpoint, frozenset(trained), device, processes)

        self._parameters: dict[str, Any] = {}
        self.rows: dict[str, Tensor] = {}

        for name in trained:
            parameter: Any = self.model.get_parameter(name)
            self._parameters[name] = parameter
            self.rows[name] = parameter.to_local().detach()  # the same memory

    def collect_gradients(self) -> None:
        """Move the gradients, already summed over processes, from FSDP's parameters to the rows."""
        gradients: dict[str, Tensor] = {}

        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.to_local()
                parameter.grad = None

        reached = {*gradients}
        # FSDP gives experts that no token chose zero gradients, where one process has none. Adam
        # must skip them in both cases: its momentum would move them.
        if self._routed:
            nonzero = [name for name, gradient in gradients.items() if gradient.any()]
            reached = set[str]().union(*self._processes.all_gather(nonzero))

        for name, gradient in gradients.items():
            if name in reached:
                self.rows[name].grad = gradient


def _load(
    checkpoint: Checkpoint, trained: frozenset[str], device: torch.device, processes: ProcessGroup
) -> nn.Module:
    """Load a model block by block; a process keeps its rows of each."""
    needed = (
        {_SUM_REDUCTION, _UNUSED_PARAMETERS}
        if checkpoint.family.expert_linears
        else {_SUM_REDUCTION}
    )
    if not needed.issubset(dir(fsdp.FSDPModule)):
        raise EnvironmentFailure(
            "old-torch",
            f"torch {torch.__version__} cannot add up this model's gradients over processes",
            remedy='update torch, set recover.methods = ["blockwise"], or start one process',
        )

    model = build_skeleton(checkpoint)
    expected = {name for name, _ in model.named_parameters()}
    if checkpoint.tied:
        expected.discard("lm_head.weight")
    check_tensors(checkpoint, expected)

    mesh = processes.mesh(device)
    decoder, _, blocks = checkpoint.family.blocks.partition(".")
    # Children first: FSDP takes what is left of a module after its wrapped children.
    units = [f"{decoder}.{blocks}.{index}" for index in range(checkpoint.shape.block_count)]

    for unit in (*units, decoder):
        module = model.get_submodule(unit)

        for name, parameter in module.named_parameters(prefix=unit):
            if parameter.is_meta:
                fill_parameter(model, name, checkpoint)
                model.get_parameter(name).requires_grad_(name in trained)

        _share_out(module, mesh, routed=bool(checkpoint.family.expert_linears))

    return model


def _share_out(module: nn.Module, mesh: Any, *, routed: bool) -> None:
    """Shard a module's parameters over the processes; gradients are sums, not means."""
    shared = fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)

    # Token weights are already shares of the whole step's, so nothing is divided.
    shared.set_gradient_divide_factor(1.0)
    shared.set_force_sum_reduction_for_comms(True)  # gloo has sums only

    if routed:  # tokens choose other experts in each process
        shared.set_reduce_scatter_unused_params(True)

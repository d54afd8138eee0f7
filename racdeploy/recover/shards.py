"""A model that several processes hold together: each has some rows of every weight.

The whole of a block is in memory while it is computed, and so is its gradient, which is summed over
the processes; what the optimizer sees are this process's rows, as plain tensors.

Source: FSDP2, ``torch.distributed.fsdp.fully_shard``, after Zhao et al. 2023 (arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp

from racdeploy.engines.backends.transformers.torch_model import fill_parameter, skeleton
from racdeploy.errors import EnvironmentFailure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_tensors
from racdeploy.prune.processes import Processes

_SUMS = "set_force_sum_reduction_for_comms"
_UNUSED = "set_reduce_scatter_unused_params"


class Shards:
    """This process's rows of the weights that learn; ``model`` has no output projection."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        trained: Sequence[str],
        device: torch.device,
        processes: Processes,
    ) -> None:
        self._processes = processes
        self._routed = bool(checkpoint.family.routed)
        self.model = _load(checkpoint, frozenset(trained), device, processes)

        self._parameters: dict[str, Any] = {}
        self.rows: dict[str, Tensor] = {}

        for name in trained:
            parameter: Any = self.model.get_parameter(name)
            self._parameters[name] = parameter
            self.rows[name] = parameter.to_local().detach()  # the same memory

    def collect(self) -> None:
        """Hand the gradients, each a sum over all processes, on to the rows."""
        slopes: dict[str, Tensor] = {}

        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                slopes[name] = parameter.grad.to_local()
                parameter.grad = None

        reached = {*slopes}
        if self._routed:  # experts that no token chose have zeros here, and alone no gradient
            own = [name for name, slope in slopes.items() if slope.any()]
            reached = set[str]().union(*self._processes.all(own))

        for name, slope in slopes.items():
            if name in reached:
                self.rows[name].grad = slope


def _load(
    checkpoint: Checkpoint, trained: frozenset[str], device: torch.device, processes: Processes
) -> nn.Module:
    """Fill a model block by block; of each, a process keeps its rows."""
    needed = {_SUMS, _UNUSED} if checkpoint.family.routed else {_SUMS}
    if not needed.issubset(dir(fsdp.FSDPModule)):
        raise EnvironmentFailure(
            "old-torch",
            f"torch {torch.__version__} cannot add up this model's gradients over processes",
            remedy='update torch, set recover.ways = ["blocks"], or start one process',
        )

    model = skeleton(checkpoint)
    expected = {name for name, _ in model.named_parameters()}
    if checkpoint.tied:
        expected.discard("lm_head.weight")
    check_tensors(checkpoint, expected)

    mesh = processes.mesh(device)
    decoder, _, blocks = checkpoint.family.blocks.partition(".")
    units = [f"{decoder}.{blocks}.{index}" for index in range(checkpoint.shape.block_count)]

    for unit in (*units, decoder):
        module = model.get_submodule(unit)

        for name, parameter in module.named_parameters(prefix=unit):
            if parameter.is_meta:
                fill_parameter(model, name, checkpoint)
                model.get_parameter(name).requires_grad_(name in trained)

        _share_out(module, mesh, routed=bool(checkpoint.family.routed))

    return model


def _share_out(module: nn.Module, mesh: Any, *, routed: bool) -> None:
    """Leave each process its rows of a module's parameters; gradients will be sums."""
    shared = fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)

    # Weights of tokens are shares of the whole step's already, so nothing is divided.
    shared.set_gradient_divide_factor(1.0)
    shared.set_force_sum_reduction_for_comms(True)  # gloo knows sums alone

    if routed:  # which experts tokens choose differs by process
        shared.set_reduce_scatter_unused_params(True)

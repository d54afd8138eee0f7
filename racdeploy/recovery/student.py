"""The student model: float32 weights, gradient checkpointing, the whole model in memory.

Several processes share it with FSDP2: each has some rows of every weight. A block is gathered while
it is computed, and so is its gradient, which is then summed over the processes. The optimizer sees
this process's rows, as plain tensors.

Source: FSDP2, ``torch.distributed.fsdp.fully_shard``, after Zhao et al. 2023 (arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp

from racdeploy.engines.backends.transformers.torch_model import (
    build_skeleton,
    fill_parameter,
    load_model,
)
from racdeploy.errors import EnvironmentFailure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tensor_coverage import check_tensors
from racdeploy.pruning.job_share import JobShare
from racdeploy.recovery.training_run import TrainingRun

_SUM_REDUCTION = "set_force_sum_reduction_for_comms"
_UNUSED_PARAMETERS = "set_reduce_scatter_unused_params"


def _load(
    checkpoint: Checkpoint, trained: frozenset[str], device: torch.device, share: JobShare
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
    shapes = {name: value.shape for name, value in model.named_parameters()}
    if checkpoint.tied:
        shapes.pop("lm_head.weight", None)
    check_tensors(checkpoint, shapes)

    mesh = share.mesh(device)
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


class Student:
    """A model with some trainable weights.

    Training may compute products in bfloat16; weights, gradients and evaluation are float32. Only
    a block's inputs are kept for the backward pass, which recomputes the rest. ``weights`` are
    whole tensors in one process, and this process's rows in several.
    """

    def __init__(self, run: TrainingRun, trained: Sequence[str]) -> None:
        self._run = run
        self._sharded: dict[str, Any] = {}  # FSDP's parameters

        if run.share.count > 1:
            # Without output projection.
            model: Any = _load(run.sparse, frozenset(trained), run.device, run.share)
            self.weights: dict[str, Tensor] = {}
            for name in trained:
                self._sharded[name] = parameter = model.get_parameter(name)
                self.weights[name] = parameter.to_local().detach()  # the same memory
        else:
            model = load_model(run.sparse).to(run.device)
            self.weights = {name: model.get_parameter(name) for name in trained}
            for weight in self.weights.values():
                weight.requires_grad_(True)

        self._model = model

        # The first block's input needs no gradient, and reentrant checkpointing would then compute
        # none for the block's weights.
        usual = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", usual)  # transformers 5.24
        enable({"use_reentrant": False})
        model.config.attention_dropout = 0.0

    def hidden_states(self, ids_BT: Tensor, *, training: bool) -> Tensor:
        """Return the last hidden states after the final norm, hidden_BTD in float32.

        With FSDP all processes must call this, and the backward pass, equally often.
        """
        self._model.train(training)  # checkpoints are only made in training

        device = self._run.device
        bfloat16 = training and self._run.compute == "bfloat16"
        compute = torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()
        with torch.set_grad_enabled(training), compute:
            output = self._model.model(input_ids=ids_BT.to(device), use_cache=False)

        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD.float()

    def backward(self, hidden_ND: Tensor, gradient_ND: Tensor) -> None:
        """Backpropagate a gradient of the hidden states; it accumulates in the weights."""
        hidden_ND.backward(gradient_ND)  # type: ignore[no-untyped-call]

    def collect_gradients(self) -> None:
        """Move a sharded model's gradients, summed over processes, from FSDP to ``weights``."""
        gradients: dict[str, Tensor] = {}

        for name, parameter in self._sharded.items():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.to_local()
                parameter.grad = None

        reached = {*gradients}
        # FSDP gives experts that no token chose zero gradients, where one process has none. Adam
        # must skip them in both cases: its momentum would move them.
        if self._run.sparse.family.expert_linears:
            nonzero = [name for name, gradient in gradients.items() if gradient.any()]
            reached = self._run.share.unite(nonzero)

        for name, gradient in gradients.items():
            if name in reached:
                self.weights[name].grad = gradient

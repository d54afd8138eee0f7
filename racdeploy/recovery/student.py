"""The student model: float32 weights, gradient checkpointing, the whole model in memory.

Several processes share it, see :mod:`racdeploy.recovery.sharded_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.recovery.sharded_model import ShardedModel
from racdeploy.recovery.training_run import TrainingRun


class Student:
    """A model with some trainable weights.

    Training may compute products in bfloat16; weights, gradients and evaluation are float32. Only
    a block's inputs are kept for the backward pass, which recomputes the rest. ``weights`` are
    whole tensors in one process, and this process's rows in several.
    """

    def __init__(self, run: TrainingRun, trained: Sequence[str]) -> None:
        self._device, self._compute = run.device, run.compute
        self._processes = run.processes
        self._shards: ShardedModel | None = None

        if run.processes.world_size > 1:
            self._shards = ShardedModel(run.sparse, trained, run.device, run.processes)
            model: Any = self._shards.model
            self.weights = self._shards.rows
        else:
            model = load_model(run.sparse).to(run.device)
            self.weights = {name: model.get_parameter(name) for name in trained}
            for weight in self.weights.values():
                weight.requires_grad_(True)

        self._model: Any = model

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

        bfloat16 = training and self._compute == "bfloat16"
        compute = torch.autocast(self._device.type, torch.bfloat16) if bfloat16 else nullcontext()
        with torch.set_grad_enabled(training), compute, self._processes.explain_lost_process():
            output = self._model.model(input_ids=ids_BT.to(self._device), use_cache=False)

        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD.float()

    def backward(self, hidden_ND: Tensor, gradient_ND: Tensor) -> None:
        """Backpropagate a gradient of the hidden states; it accumulates in the weights."""
        with self._processes.explain_lost_process():
            hidden_ND.backward(gradient_ND)  # type: ignore[no-untyped-call]

    def collect_gradients(self) -> None:
        """Move the gradients of a step to ``weights``, where the model is sharded."""
        if self._shards:
            self._shards.collect_gradients()

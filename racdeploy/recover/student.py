"""The model that learns, whole in memory: float32 weights, activations computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch

from racdeploy.engines.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint


class Student:
    """A model of which some weights learn.

    Products may be bfloat16 while it learns; weights, their gradients and what is measured are
    float32. Of a block only what enters it is kept for the backward pass; the rest is computed
    again there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        trained: Sequence[str],
        compute: Literal["float32", "bfloat16"],
        device: torch.device,
    ) -> None:
        self._device, self._compute = device, compute
        model: Any = load_model(checkpoint).to(device)
        self._model: Any = model
        self.weights = {name: model.get_parameter(name) for name in trained}

        for weight in self.weights.values():
            weight.requires_grad_(True)

        # What enters the first block has no gradient of its own, so the checkpoints must not ask
        # for one: that is what "reentrant" would do.
        kept = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
        model.config.attention_dropout = 0.0

    def hidden(self, ids_BT: torch.Tensor, *, learns: bool) -> torch.Tensor:
        """Return the last hidden states after their norm, hidden_BTD in float32."""
        self._model.train(learns)  # checkpoints are only made in training

        bfloat16 = learns and self._compute == "bfloat16"
        compute = torch.autocast(self._device.type, torch.bfloat16) if bfloat16 else nullcontext()
        with torch.set_grad_enabled(learns), compute:
            found = self._model.model(input_ids=ids_BT.to(self._device), use_cache=False)

        hidden_BTD: torch.Tensor = found.last_hidden_state
        return hidden_BTD.float()

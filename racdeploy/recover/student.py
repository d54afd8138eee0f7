"""The model that learns, whole in memory: float32 weights, activations computed twice.

Several processes hold it together, see :mod:`racdeploy.recover.shards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.recover.course import Course
from racdeploy.recover.shards import Shards


class Student:
    """A model of which some weights learn.

    Products may be bfloat16 while it learns; weights, their gradients and what is measured are
    float32. Of a block only what enters it is kept for the backward pass; the rest is computed
    again there. ``weights`` are whole in one process, and this one's rows of them in several.
    """

    def __init__(self, course: Course, trained: Sequence[str]) -> None:
        self._device, self._compute = course.device, course.compute
        self._processes = course.processes
        self._shards: Shards | None = None

        if course.processes.count > 1:
            self._shards = Shards(course.sparse, trained, course.device, course.processes)
            model: Any = self._shards.model
            self.weights = self._shards.rows
        else:
            model = load_model(course.sparse).to(course.device)
            self.weights = {name: model.get_parameter(name) for name in trained}
            for weight in self.weights.values():
                weight.requires_grad_(True)

        self._model: Any = model

        # What enters the first block has no gradient of its own, so the checkpoints must not ask
        # for one: that is what "reentrant" would do.
        usual = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", usual)  # transformers 5.24
        enable({"use_reentrant": False})
        model.config.attention_dropout = 0.0

    def hidden(self, ids_BT: Tensor, *, learns: bool) -> Tensor:
        """Return the last hidden states after their norm, hidden_BTD in float32.

        All processes call this equally often, and the backward pass of what it returns.
        """
        self._model.train(learns)  # checkpoints are only made in training

        bfloat16 = learns and self._compute == "bfloat16"
        compute = torch.autocast(self._device.type, torch.bfloat16) if bfloat16 else nullcontext()
        with torch.set_grad_enabled(learns), compute, self._processes.talking():
            found = self._model.model(input_ids=ids_BT.to(self._device), use_cache=False)

        hidden_BTD: Tensor = found.last_hidden_state
        return hidden_BTD.float()

    def pull(self, hidden_ND: Tensor, slope_ND: Tensor) -> None:
        """Add to the gradients what a slope of hidden states means for them."""
        with self._processes.talking():
            hidden_ND.backward(slope_ND)  # type: ignore[no-untyped-call]

    def collect(self) -> None:
        """Hand on the gradients of a step, where processes have parts of them."""
        if self._shards:
            self._shards.collect()

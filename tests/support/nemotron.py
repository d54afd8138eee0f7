"""What transformers' Nemotron-H computes otherwise than its config says, put right."""

from __future__ import annotations

from typing import Any


def follow_config(model: Any) -> None:
    """Tie the embeddings if the config does, and let a step of a state be as short as it says.

    transformers has a floor of its own under steps: see its pull request 48989.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight

    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = model.config.time_step_limit

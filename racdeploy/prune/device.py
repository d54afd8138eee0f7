"""Where blocks are computed, in float32 (no TF32): the CPU, or a GPU with one block at a time."""

from __future__ import annotations

import os

import torch

from racdeploy.errors import EnvironmentFailure

CPU = torch.device("cpu")


def choose_device(asked: str) -> torch.device:
    """Return the device ``prune.device`` means; ``LOCAL_RANK`` shares out a machine's GPUs."""
    if asked != "cpu" and torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank % torch.cuda.device_count())

    if asked in {"cpu", "auto"}:
        return CPU

    raise EnvironmentFailure(
        "no-gpu",
        f"prune.device is {asked!r}, and torch {torch.__version__} finds no GPU",
        remedy="install a build of torch for this GPU and its driver, or set prune.device to 'cpu'",
    )

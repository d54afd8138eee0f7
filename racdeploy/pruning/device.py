"""Device that computes the blocks, in float32 without TF32: the CPU, or a GPU."""

from __future__ import annotations

import os

import torch

from racdeploy.errors import EnvironmentFailure

CPU = torch.device("cpu")


def choose_device(setting: str) -> torch.device:
    """Return the device that ``prune.device`` asks for.

    With several processes on a machine each takes the GPU of its ``LOCAL_RANK``.

    Raises:
        EnvironmentFailure: a GPU is asked for, and torch finds none.
    """
    if setting != "cpu" and torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank % torch.cuda.device_count())

    if setting in {"cpu", "auto"}:
        return CPU

    raise EnvironmentFailure(
        "no-gpu",
        f"torch {torch.__version__} finds no GPU",
        remedy="install a build of torch for this GPU and its driver, or set prune.device to 'cpu'",
    )

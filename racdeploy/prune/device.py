"""Where blocks are computed: the CPU, or a GPU with one block at a time.

Only what a block computes with goes to the device, and its results come back. Products are float32
on either (torch leaves TF32 off), so they differ by the order of sums.
"""

from __future__ import annotations

import os

import torch

from racdeploy.errors import EnvironmentFailure

CPU = torch.device("cpu")


def choose_device(asked: str) -> torch.device:
    """Return the device that a recipe's ``prune.device`` means here.

    Processes of one machine take its GPUs in turn, by torchrun's ``LOCAL_RANK``.
    """
    if asked != "cpu" and torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank % torch.cuda.device_count())

    if asked in {"cpu", "auto"}:
        return CPU

    raise EnvironmentFailure(
        f"prune.device is {asked!r}, and torch {torch.__version__} finds no GPU",
        remedy="install a build of torch for this GPU and its driver, or set prune.device to 'cpu'",
    )

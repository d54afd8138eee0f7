"""The sparsity of every pruned linear, decided once before the walk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from racdeploy import plugins
from racdeploy.prune.allocations import Effect, Observation, Shares
from racdeploy.prune.batches import Batch
from racdeploy.prune.blocks import Blocks
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.processes import Processes
from racdeploy.prune.survey import survey
from racdeploy.recipe import Pruning
from racdeploy.storage.files import read_json, write_atomic


def decide_shares(
    blocks: Blocks,
    batches: Sequence[Batch],
    everyones: Sequence[Batch],
    settings: Pruning,
    weights_R: torch.Tensor,
    folder: Path,
    processes: Processes,
    progress: Callable[[str, int, int], None] | None = None,
) -> Shares:
    """Return the sparsity of each linear that is pruned, or read what an earlier run decided.

    Args:
        batches: calibration batches of this process.
        everyones: those of all processes.
    """
    file = folder / "allocation.json"
    if not processes.ask_first(file.is_file):
        plugin = plugins.load("allocations", settings.allocation)
        sizes = _sizes(blocks, settings)

        def observe(weight_OI: torch.Tensor, hessian: Hessian, effect: Effect) -> Observation:
            found: Observation = plugin.observe(weight_OI, hessian, effect, settings)
            return found

        observations: Mapping[str, Observation] = {}
        if plugin.SURVEYS:
            observations = survey(
                blocks,
                batches,
                everyones,
                sizes,
                weights_R,
                settings.damping,
                observe,
                folder,
                processes,
                progress,
            )
        shares = plugin.allocate(observations, sizes, settings.sparsity)
        if processes.first:
            values = {"shares": shares, "observations": observations}
            write_atomic(file, json.dumps(values, indent=1))

    decided: Shares = processes.ask_first(lambda: read_json(file)["shares"])
    return decided


def _sizes(blocks: Blocks, settings: Pruning) -> dict[str, int]:
    """Return the number of weights of each linear that is pruned, in forward order."""
    checkpoint, sizes = blocks.checkpoint, dict[str, int]()
    for index in range(checkpoint.block_count):
        for linear in checkpoint.family.linears:
            name = f"{blocks.prefix(index)}.{linear}"
            if not any(re.search(pattern, name) for pattern in settings.dense):
                sizes[name] = math.prod(checkpoint.entries[f"{name}.weight"].shape)
    return sizes

"""The sparsity of every pruned linear, decided once before the walk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

import torch

from racdeploy import plugins
from racdeploy.prune.allocations import Effect, Observation, Shares
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.session import Session
from racdeploy.prune.survey import survey
from racdeploy.storage.files import read_json, write_atomic


def decide_shares(session: Session) -> Shares:
    """Return the sparsity of each linear that is pruned, or read what an earlier run decided."""
    file = session.folder / "allocation.json"
    processes = session.processes
    if not processes.ask_first(file.is_file):
        values = _allocate(session)
        if processes.first:
            write_atomic(file, json.dumps(values, indent=1))

    shares: Shares = processes.ask_first(lambda: read_json(file)["shares"])
    return shares


def _allocate(session: Session) -> dict[str, Mapping[str, object]]:
    """Return shares, and the observations that they rest on."""
    settings = session.settings
    plugin = plugins.load("allocations", settings.allocation)

    def observe(weight_OI: torch.Tensor, hessian: Hessian, effect: Effect) -> Observation:
        found: Observation = plugin.observe(weight_OI, hessian, effect, settings)
        return found

    sizes = _count_weights(session)
    observations = survey(session, sizes, observe) if plugin.SURVEYS else {}
    shares = plugin.allocate(observations, sizes, settings.sparsity)
    return {"shares": shares, "observations": observations}


def _count_weights(session: Session) -> dict[str, int]:
    checkpoint, sizes = session.blocks.checkpoint, dict[str, int]()
    for index in range(checkpoint.block_count):
        for linear in checkpoint.family.linears:
            name = f"{session.blocks.prefix(index)}.{linear}"
            if not any(re.search(pattern, name) for pattern in session.settings.dense):
                sizes[name] = math.prod(checkpoint.entries[f"{name}.weight"].shape)
    return sizes

"""The walk over the blocks: gather statistics, prune, write, and pass the sparse block's output on.

One block's weights are in memory at a time, twice: dense and partly pruned. Linears that share an input are pruned
together, and the next ones see what they leave. A finished block is a file, so an interrupted walk goes on with the
first block that has none; nothing of the rest is lost, and the result is byte for byte the same. Several processes
share the batches and the linears (:mod:`racdeploy.prune.processes`); the first one writes.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from racdeploy import plugins
from racdeploy.engines.transformers.torch_model import TORCH_DTYPES
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_covered
from racdeploy.prune.allocations import Observation
from racdeploy.prune.batches import Batch, make_batches
from racdeploy.prune.blocks import Blocks, put
from racdeploy.prune.device import choose_device
from racdeploy.prune.flow import Flow
from racdeploy.prune.held_out import RelativeError
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.patterns import Pattern, Within, pattern_of
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.prune.pruned_linear import PrunedLinear, importance, measured
from racdeploy.prune.refit import prune_and_refit
from racdeploy.prune.rounding import round_to_grid
from racdeploy.prune.statistics import InputStatistic
from racdeploy.prune.survey import survey
from racdeploy.quant import as_grid
from racdeploy.recipe import Pruning, StreamWeights
from racdeploy.report.model import BlockRow, LinearRow
from racdeploy.storage.files import read_json, write_atomic
from racdeploy.storage.heap import keep_heap
from racdeploy.traces.trace import STREAMS, Trace

Progress = Callable[[str, int, int], None]


def prune_blocks(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],
    held_out: Sequence[Trace],
    settings: Pruning,
    folder: Path,
    weights: StreamWeights | None = None,
    quant: str = "",
    within: Path | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> tuple[list[LinearRow], list[BlockRow]]:
    """Prune every block of a checkpoint and leave one safetensors file per block in ``folder``.

    Args:
        checkpoint: the dense model.
        calibration: traces that decide the pruning.
        held_out: traces that only measure it.
        settings: method, pattern, sparsity.
        folder: receives ``block-00000.safetensors`` and ``.json``; finished ones are reused.
        weights: what a token of each stream counts; None is 1 for all.
        quant: number format whose codes are chosen while pruning; empty leaves rounding to the export.
        within: folder of an earlier walk whose zeros stay zeros; weights are solved from the dense ones all the same.
        threads: CPU threads; 0 leaves torch's choice. Every process uses as many as the first.
        progress: called with a label, blocks done and blocks in all.
        processes: who share the work; each calls this with the same arguments and a folder of its own.

    Returns:
        One row per linear, in forward order, and one per block.

    Raises:
        UsageError: no calibration tokens, a pattern that does not divide a linear, or a matrix that nobody prunes.
    """
    if not calibration:
        raise UsageError(
            "no calibration traces are left after selection", remedy="collect more traces"
        )
    check_covered(checkpoint, settings.dense)
    keep_heap()
    torch.set_num_threads(processes.tell(threads or torch.get_num_threads()))
    tasks = sorted({trace.task for trace in (*calibration, *held_out)})
    fitted = make_batches(calibration, tasks, held_out=False)
    batches = fitted + make_batches(held_out, tasks, held_out=True)
    mine = [batches[index] for index in processes.mine([batch.ids_BT.numel() for batch in batches])]
    walk = _Walk(
        checkpoint,
        settings,
        weights or StreamWeights(),
        quant,
        within,
        folder,
        tasks,
        mine,
        processes,
    )
    linears: list[LinearRow] = []
    blocks: list[BlockRow] = []
    try:
        with torch.inference_mode():
            walk.allocate(fitted, progress)
            walk.embed()
            for index in range(checkpoint.block_count):
                rows, row = walk.step(index)
                linears += rows
                blocks.append(row)
                if progress:
                    progress("prune", index + 1, checkpoint.block_count)
    finally:
        walk.close()
    return linears, blocks


@dataclass
class _Walk:
    """State that the blocks share: settings, hidden states, and where results go."""

    checkpoint: Checkpoint
    settings: Pruning
    weights: StreamWeights
    quant: str
    within: Path | None
    folder: Path
    tasks: Sequence[str]
    batches: Sequence[Batch]
    processes: Processes

    def __post_init__(self) -> None:
        self.blocks = Blocks(
            self.checkpoint, self.settings.compute, choose_device(self.settings.device)
        )
        self.weights_S = self.blocks.place(
            torch.tensor([getattr(self.weights, stream) for stream in STREAMS])
        )
        self.method = plugins.load("methods", self.settings.method)
        self.first = self.processes.rank == 0
        self.sparse = Flow(self.blocks, self.batches, self.folder, "sparse")
        self.dense = Flow(self.blocks, self.batches, self.folder, "dense")

    def close(self) -> None:
        """Remove the hidden states."""
        self.sparse.close()
        self.dense.close()

    def allocate(self, fitted: Sequence[Batch], progress: Progress | None) -> None:
        """Decide the sparsity of every pruned linear, from all calibration batches, or read what was decided."""
        checkpoint, settings, file = self.checkpoint, self.settings, self.folder / "allocation.json"
        linears = [
            f"{self.blocks.prefix(i)}.{n}"
            for i in range(checkpoint.block_count)
            for n in checkpoint.family.linears
        ]
        sizes = {
            n: math.prod(checkpoint.entries[f"{n}.weight"].shape)
            for n in linears
            if not self._stays_dense(n)
        }
        if not self.processes.tell(file.is_file()):
            plugin = plugins.load("allocations", settings.allocation)
            observations: dict[str, Observation] = {}
            if plugin.SURVEYS:
                seen = [batch for batch in self.batches if not batch.held_out]
                observations = survey(
                    self.blocks,
                    seen,
                    fitted,
                    sizes,
                    self.weights_S,
                    settings.damping,
                    lambda weight_OI, hessian, effect: plugin.observe(
                        weight_OI, hessian, effect, settings
                    ),
                    self.folder,
                    self.processes,
                    progress,
                )
            shares = plugin.allocate(observations, sizes, settings.sparsity)
            if self.first:
                write_atomic(
                    file, json.dumps({"shares": shares, "observations": observations}, indent=1)
                )
        self.shares: dict[str, float] = self.processes.tell(
            read_json(file)["shares"] if self.first else {}
        )

    def embed(self) -> None:
        """Fill the hidden states with the token embeddings."""
        for index, hidden_BTD in enumerate(self.blocks.embed(self.batches)):
            self.sparse.hidden[index] = hidden_BTD
            if self._needs_dense(self.batches[index]):
                self.dense.hidden[index] = hidden_BTD

    def step(self, index: int) -> tuple[list[LinearRow], BlockRow]:
        """Prune one block, or read it if it is already on disk, and advance the hidden states."""
        prefix = self.blocks.prefix(index)
        sparse = copy.deepcopy(self.blocks.empty(index))
        dense = self.blocks.load(index)
        for name, parameter in dense.named_parameters():
            put(sparse, name, parameter)
        stem = self.folder / f"block-{index:05d}"
        weights, report = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
        if self.processes.tell(report.is_file()):
            self._restore(prefix, sparse, weights)
            self._advance(dense, sparse, {})
            found = self.processes.tell(read_json(report) if self.first else {})
            linears = [LinearRow.model_validate(row) for row in found["linears"]]
            block = BlockRow.model_validate(found["block"])
        else:
            pruned = self._prune(prefix, dense, sparse)
            if self.first:
                stored = {
                    f"{prefix}.{name}.weight": row.stored_OI.cpu() for name, row in pruned.items()
                }
                write_atomic(weights, save(stored))
                if not self.quant:  # codes that are chosen already are written as they are
                    write_atomic(
                        self.folder / f"importance-{index:05d}.safetensors",
                        save(importance(prefix, pruned)),
                    )
            drift = self._advance(dense, sparse, pruned)
            for error in (drift, *(linear.error for linear in pruned.values())):
                error.share(self.processes)
            linears = self._linear_rows(prefix, pruned)
            block = BlockRow(
                block=index,
                drift=drift.total,
                drift_by_stream=drift.by_stream,
                drift_by_task=drift.by_task,
            )
            values = {"linears": [row.model_dump() for row in linears], "block": block.model_dump()}
            if self.first:
                write_atomic(report, json.dumps(values, indent=1))
        dense.to("meta")
        return linears, block

    def _restore(self, prefix: str, sparse: nn.Module, weights: Path) -> None:
        """Put the linears of a finished block into ``sparse``; only the first process has the file."""
        found = load_file(weights) if self.first else {}
        for name in self.processes.tell(list(found)):
            parameter = name.removeprefix(f"{prefix}.")
            value = (
                found[name].float()
                if self.first
                else torch.empty(sparse.get_parameter(parameter).shape)
            )
            self.processes.spread(value, 0)
            put(sparse, parameter, self.blocks.place(value))

    def _prune(self, prefix: str, dense: nn.Module, sparse: nn.Module) -> dict[str, PrunedLinear]:
        """Prune the linears of a block, group by group, and put them into ``sparse``."""
        pruned: dict[str, PrunedLinear] = {}
        for group, linears in enumerate(self.checkpoint.family.input_groups):
            if wanted := [name for name in linears if not self._stays_dense(f"{prefix}.{name}")]:
                pruned |= self._prune_group(prefix, dense, sparse, group, wanted)
        return pruned

    def _prune_group(
        self, prefix: str, dense: nn.Module, sparse: nn.Module, group: int, names: Sequence[str]
    ) -> dict[str, PrunedLinear]:
        """Prune linears of a group, which share an input: each in the process that owns it, then everywhere."""
        full = [dense.get_parameter(f"{name}.weight") for name in names]
        patterns = [
            self._pattern(f"{prefix}.{name}", w_OI.shape)
            for name, w_OI in zip(names, full, strict=True)
        ]
        owners = self.processes.owners([weight_OI.numel() for weight_OI in full])
        statistic = self._gather(dense, sparse, group, full)
        statistic.share(self.processes, owners)
        importance_I, tokens = statistic.importance_I, round(statistic.weight)
        own = [index for index, owner in enumerate(owners) if owner == self.processes.rank]
        solved = self._solve(own, full, patterns, statistic) if own else {}
        pruned = {}
        for index, (name, owner) in enumerate(zip(names, owners, strict=True)):
            stored = (
                "F32" if self.quant else self.checkpoint.entries[f"{prefix}.{name}.weight"].dtype
            )
            dtype = TORCH_DTYPES[stored]  # codes times a scale need more digits than bfloat16 has
            weight_OI, target_OI, damping = solved.get(index, (full[index], full[index], 0.0))
            stored_OI, error = weight_OI.to(dtype).contiguous(), RelativeError(self.tasks)
            linear = PrunedLinear(stored_OI, target_OI, damping, error, importance_I, tokens)
            pruned[name] = linear.spread(self.processes, owner, self.settings.match_dense)
            put(sparse, f"{name}.weight", pruned[name].stored_OI.float())
        return pruned

    def _solve(
        self,
        own: Sequence[int],
        full: Sequence[torch.Tensor],
        patterns: Sequence[Pattern],
        statistic: InputStatistic,
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor, float]]:
        """Return, for linears of a group by index, the pruned weights, what they were solved for, and the damping."""
        hessian = statistic.hessian(self.settings.damping)
        targets = (
            statistic.targets(own, hessian) if self.settings.match_dense else dict(enumerate(full))
        )
        return {
            i: (self._prune_linear(targets[i], hessian, patterns[i]), targets[i], hessian.damping)
            for i in own
        }

    def _stays_dense(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.settings.dense)

    def _needs_dense(self, batch: Batch) -> bool:
        return self.settings.match_dense or batch.held_out

    def _gather(
        self, dense: nn.Module, sparse: nn.Module, group: int, full: Sequence[torch.Tensor]
    ) -> InputStatistic:
        """Return the statistic of a group's input, over this process's calibration batches."""
        match_dense = self.settings.match_dense
        statistic = InputStatistic(full[0].shape[1], self.weights_S, full if match_dense else ())
        for index, batch in enumerate(self.batches):
            if batch.held_out:
                continue
            sparse_BTI = self.sparse.input(sparse, group, index)
            dense_BTI = self.dense.input(dense, group, index) if match_dense else None
            statistic.add(sparse_BTI, dense_BTI, batch.stream_BT)
        return statistic

    def _prune_linear(
        self, target_OI: torch.Tensor, hessian: Hessian, pattern: Pattern
    ) -> torch.Tensor:
        live_OI = target_OI * ~hessian.dead_I
        pruned = prune_and_refit(self.method, live_OI, hessian, pattern, self.settings)
        if not self.quant:
            return pruned.weight_OI
        return round_to_grid(
            pruned.weight_OI, pruned.keep_OI, live_OI, hessian, as_grid(self.quant)
        )

    def _pattern(self, name: str, shape: torch.Size) -> Pattern:
        """Return the zeros that a linear shall have: at least where the earlier walk left them."""
        pattern = pattern_of(self.shares[name], self.settings.kept_of)
        pattern.check(name, shape[1])
        if not self.within:
            return pattern
        gone_OI = torch.empty(shape, dtype=torch.bool)
        if self.first:
            index = int(name.removeprefix(f"{self.checkpoint.family.blocks}.").partition(".")[0])
            with safe_open(self.within / f"block-{index:05d}.safetensors", "pt") as file:
                gone_OI = file.get_tensor(f"{name}.weight") == 0
        self.processes.spread(gone_OI, 0)
        return Within(pattern, self.blocks.place(gone_OI))

    def _advance(
        self, dense: nn.Module, sparse: nn.Module, pruned: Mapping[str, PrunedLinear]
    ) -> RelativeError:
        """Replace the hidden states by the blocks' outputs; measure on held-out batches on the way."""
        drift = RelativeError(self.tasks)
        for index, batch in enumerate(self.batches):
            with measured(sparse, pruned if batch.held_out else {}, batch):
                sparse_BTD = self.sparse.leave(sparse, index)
            if self._needs_dense(batch):
                dense_BTD = self.dense.leave(dense, index)
                if batch.held_out:
                    drift.add(sparse_BTD, dense_BTD, batch)
        return drift

    def _linear_rows(self, prefix: str, pruned: Mapping[str, PrunedLinear]) -> list[LinearRow]:
        rows = []
        for name in self.checkpoint.family.linears:
            full, linear = f"{prefix}.{name}", pruned.get(name)
            if linear:
                rows.append(linear.row(full, self.shares[full], self.quant))
            else:
                rows.append(LinearRow(name=full, sparsity_asked=0.0, sparsity_reached=0.0))
        return rows

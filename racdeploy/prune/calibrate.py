"""The walk over the blocks: gather statistics, cut, prune, write, and pass the output on.

One block is in memory at a time, dense and partly pruned; linears that share an input go together.
A finished block is a file, so an interrupted walk resumes, and ends byte for byte the same.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from racdeploy import plugins
from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_covered
from racdeploy.models.families import expert_of, name_experts
from racdeploy.processes.heap import keep_heap
from racdeploy.prune.device import choose_device
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.prune.structure.cut import BlockSite, Cut, cut_inputs, list_cuts, narrow
from racdeploy.prune.structure.decision import decide_outline
from racdeploy.prune.structure.outline import Outline, whole
from racdeploy.prune.walk.assemble import CutShape
from racdeploy.prune.walk.batches import Batch, make_batches
from racdeploy.prune.walk.block_files import BlockFiles
from racdeploy.prune.walk.blocks import Blocks, put
from racdeploy.prune.walk.experts import measure_experts
from racdeploy.prune.walk.flow import Flow
from racdeploy.prune.walk.held_out import RelativeError
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.walk.pair import BlockPair
from racdeploy.prune.walk.pruned_linear import PrunedLinear, measure_outputs, remember_outputs
from racdeploy.prune.walk.routing import remember_routing
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.survey import Effect, Observation, survey
from racdeploy.prune.weights.shares import Shares, fill_shares
from racdeploy.prune.weights.solving import LinearPruner
from racdeploy.quant import Codes
from racdeploy.recipe import Pruning, StreamWeights, Structure
from racdeploy.results.pruning import BlockRow, LinearRow
from racdeploy.traces.trace import STREAMS, Trace

WHOLE, ALIKE = Structure(), StreamWeights()


def prune_blocks(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],  # these decide the pruning
    held_out: Sequence[Trace],  # these only measure it
    settings: Pruning,
    folder: Path,  # finished blocks in it are reused
    weights: StreamWeights = ALIKE,  # what a token of each stream counts
    quant: Codes = "",  # format whose codes are chosen while pruning; empty: the export rounds
    keeps_own_zeros: bool = False,  # the checkpoint is sparse already, and gets no other zeros
    threads: int = 0,  # 0 leaves torch's choice; every process uses as many as the first
    progress: Progress | None = None,
    processes: Processes = ALONE,  # each calls this with the same arguments and its own folder
    structure: Structure = WHOLE,  # what is cut before zeros are chosen
) -> tuple[list[LinearRow], list[BlockRow]]:
    """Prune every block of a checkpoint and leave one safetensors file per block in ``folder``.

    Returns one row per linear, in forward order, and one per block; blocks that are left out have
    none, and the others are numbered anew.

    Raises:
        UsageError: there are no calibration traces.
    """
    if not calibration:
        reason = "no calibration traces are left after selection"
        raise UsageError("no-calibration-traces", reason, remedy="collect more traces")

    check_covered(checkpoint)
    keep_heap()
    torch.set_num_threads(processes.tell(threads or torch.get_num_threads()))

    tasks = sorted({trace.task for trace in (*calibration, *held_out)})
    fitted = make_batches(calibration, tasks, held_out=False)
    batches = fitted + make_batches(held_out, tasks, held_out=True)
    own = processes.mine([batch.ids_BT.numel() for batch in batches])

    blocks = Blocks(checkpoint, settings.compute, choose_device(settings.device))
    session = Session(
        blocks=blocks,
        batches=[batches[index] for index in own],
        everyones=fitted,
        weights_R=blocks.place(torch.tensor([getattr(weights, stream) for stream in STREAMS])),
        settings=settings,
        folder=folder,
        processes=processes,
        progress=progress,
        tasks=tasks,
    )

    with torch.inference_mode():
        outline = decide_outline(session, structure)
        sizes = _count_weights(session, outline.shape(checkpoint.shape, structure))
        shares = _decide_shares(session, sizes)
        pruner = LinearPruner(session, shares, quant, keeps_own_zeros=keeps_own_zeros)
        with closing(_Walk(pruner, outline, structure)) as walk:
            return walk.run()


def _decide_shares(session: Session, sizes: Mapping[str, int]) -> Shares:
    """Return the sparsity of each linear of these sizes, or read what an earlier run decided."""
    file = session.folder / "allocation.json"
    processes = session.processes
    settings = session.settings

    if not processes.ask_first(file.is_file):
        plugin = plugins.load("allocations", settings.allocation)

        def observe(
            _: str, weight_OI: torch.Tensor, hessian: Hessian, effect: Effect
        ) -> Observation:
            found: Observation = plugin.observe(weight_OI, hessian, effect, settings)
            return found

        observations = {}
        if plugin.SURVEYS:
            observations = survey(session, sizes, observe)
        if settings.shares:
            shares = fill_shares(settings.shares, sizes, settings.sparsity)
        else:
            shares = plugin.allocate(observations, sizes, settings.sparsity)

        if processes.first:
            values = {"shares": shares, "observations": observations}
            write_atomic(file, json.dumps(values, indent=1))

    decided: Shares = processes.ask_first(lambda: read_json(file)["shares"])
    return decided


def _count_weights(session: Session, shape: CutShape) -> dict[str, int]:
    """Return how many weights each linear that is pruned has after the cut, by its dense name."""
    dense = session.blocks.shape
    sizes = {}

    for place, index in enumerate(shape.blocks):
        for linear in dense.linears[index]:
            name = f"{session.blocks.prefix(index)}.{linear}"
            if not any(re.search(pattern, name) for pattern in session.settings.dense):
                own = widths.shape(dense.family, f"{linear}.weight", shape.sizes[place])
                sizes[name] = math.prod(own)

    return sizes


class _Walk:
    """The dense and the partly pruned model, side by side, on their way through the blocks."""

    def __init__(self, pruner: LinearPruner, outline: Outline, structure: Structure) -> None:
        self.pruner = pruner
        self.outline = outline
        self.session = pruner.session
        self.processes = self.session.processes
        self.batches = self.session.batches
        self.blocks = self.session.blocks
        self.shape = self.blocks.shape
        self.criterion = plugins.load("criteria", structure.criterion)
        self.cuts = list_cuts(self.shape, outline, structure)
        self.files = BlockFiles(self.session.folder, self.processes)

        # What reaches each block. The dense model is only followed where its states are needed.
        self.sparse = Flow(self.blocks, self.batches, self.session.folder, "sparse")
        self.dense = Flow(self.blocks, self.batches, self.session.folder, "dense")

    def close(self) -> None:
        """Remove the hidden states."""
        self.sparse.close()
        self.dense.close()

    def run(self) -> tuple[list[LinearRow], list[BlockRow]]:
        """Prune block after block, or read those that are finished."""
        for batch, hidden_BTD in enumerate(self.blocks.embed(self.batches)):
            self.sparse.hidden[batch] = hidden_BTD
            if self._needs_dense(self.batches[batch]):
                self.dense.hidden[batch] = hidden_BTD

        linears: list[LinearRow] = []
        blocks: list[BlockRow] = []
        places = {index: place for place, index in enumerate(self.outline.blocks)}

        for index in range(self.shape.block_count):
            if index in places:
                pair = self._load(index, places[index])
                pass_block = self._prune
                if self.files.is_finished(pair.place):
                    pass_block = self._restore
                linear_rows, block_row = pass_block(pair)
                linears += linear_rows
                blocks.append(block_row)
            else:
                self._skip(index)

            self.blocks.empty(index).to("meta")
            self.session.report("prune", index + 1)

        return linears, blocks

    def _load(self, index: int, place: int) -> BlockPair:
        """Return a dense block, and a second one that begins with the same tensors."""
        sparse = copy.deepcopy(self.blocks.empty(index))
        dense = self.blocks.load(index)
        for name, parameter in dense.named_parameters():
            put(sparse, name, parameter)
        return BlockPair(
            self.blocks.checkpoint, index, place, dense, sparse, self.dense, self.sparse
        )

    def _skip(self, index: int) -> None:
        """Let the dense model alone pass a block that the pruned one is without."""
        dense = self.blocks.load(index)
        for batch in range(len(self.batches)):
            if self._needs_dense(self.batches[batch]):
                self.dense.leave(dense, batch)

    def _restore(self, pair: BlockPair) -> tuple[list[LinearRow], BlockRow]:
        """Read a finished block, and advance the hidden states."""
        kept = self.files.kept(pair.place)
        for cut in self.cuts:
            if cut.part in kept:
                narrow(pair, cut.layouts[pair.place], kept[cut.part])

        for name, value in self.files.weights(pair.place):
            put(pair.sparse, name.removeprefix(pair.name("")), self.blocks.place(value))

        self._advance(pair, {})
        return self.files.rows(pair.place)

    def _prune(self, pair: BlockPair) -> tuple[list[LinearRow], BlockRow]:
        """Cut and prune a block group by group, write it, and advance the hidden states."""
        pruned: dict[str, PrunedLinear] = {}

        for group, linears in enumerate(pair.input_groups):
            for cut in self.cuts:
                is_cut = cut.counts[pair.place] < cut.layouts[pair.place].units
                if cut.before == group and is_cut:
                    self._cut(pair, cut)

            names = name_experts(linears, len(pair.experts))
            wanted = [name for name in names if pair.dense_name(name) in self.pruner.shares]
            if wanted:
                pruned |= self.pruner.prune_group(pair, group, wanted)

        self._write_weights(pair, pruned)

        drift = self._advance(pair, pruned)
        drift.share(self.processes)
        for linear in pruned.values():
            linear.error.share(self.processes)

        linear_rows = self._linear_rows(pair, pruned)
        parts = {"drift_by_stream": drift.by_stream, "drift_by_task": drift.by_task}
        block_row = BlockRow(block=pair.place, drift=drift.total, **parts)
        self.files.write_rows(pair.place, linear_rows, block_row, pair.kept)
        return linear_rows, block_row

    def _cut(self, pair: BlockPair, cut: Cut) -> None:
        """Cut a part of a block by the criterion."""
        plugin = plugins.load("structures", cut.part)
        site = BlockSite(self.session, self.criterion, cut.counts[pair.place], pair, cut)
        cut_part = getattr(plugin, "cut", cut_inputs)
        pair.kept[cut.part] = cut_part(site)

        if cut.linear and pair.dense_name(cut.linear) not in self.pruner.shares:
            name = f"{cut.linear}.weight"
            weight_OI = pair.sparse.get_parameter(name)
            stored_OI = weight_OI.to(pair.stored_dtype(name))
            put(pair.sparse, name, stored_OI.float())  # as read back

    def _write_weights(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> None:
        named = {pair.name(f"{linear}.weight"): row for linear, row in pruned.items()}
        tensors = self._list_cut_tensors(pair) | {
            name: row.stored_OI for name, row in named.items()
        }
        self.files.write_weights(pair.place, tensors)

        if not self.pruner.quant:  # the export chooses scales by importance, and these are chosen
            self.files.write_importance(pair.place, named)
            if self.outline != whole(self.shape):
                self._write_dense_importance(pair, pruned)

    def _write_dense_importance(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> None:
        """Write the importance of all inputs, for the model that was cut."""
        named = {}
        for linear, row in pruned.items():
            mean_I = pair.narrowed.get(linear, row.importance_I)
            named[pair.dense_name(f"{linear}.weight")] = replace(row, importance_I=mean_I)

        self.files.write_importance(pair.place, named, "dense-importance")

    def _list_cut_tensors(self, pair: BlockPair) -> dict[str, torch.Tensor]:
        """Return what a cut changed, as it is stored, by new names."""
        are_moved = len(pair.experts) < self.shape.num_experts

        changed = {}
        for name, parameter in pair.sparse.named_parameters():
            is_moved = are_moved and expert_of(name) is not None
            if is_moved or parameter.shape != pair.dense.get_parameter(name).shape:
                changed[pair.name(name)] = parameter.data.to(pair.stored_dtype(name))
        return changed

    def _advance(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> RelativeError:
        """Replace the hidden states by the blocks' outputs, and measure on held-out batches."""
        drift = RelativeError(self.session.tasks)

        for index, batch in enumerate(self.batches):
            measured = pruned if batch.held_out else {}
            dense_BTD: torch.Tensor | None = None
            outputs: dict[str, torch.Tensor] = {}

            if self._needs_dense(batch):
                narrowed = pair.narrowed.keys() & measured.keys()
                with remember_outputs(pair.dense, narrowed) as outputs:
                    dense_BTD = self.dense.leave(pair.dense, index)

            sparse_BTD = self._leave(pair, index, measured, outputs)
            if batch.held_out and dense_BTD is not None:
                drift.add(sparse_BTD, dense_BTD, batch)

        return drift

    def _leave(
        self,
        pair: BlockPair,
        index: int,
        measured: Mapping[str, PrunedLinear],
        dense: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Let a batch pass the sparse block, and measure what it shows of some linears."""
        batch = self.batches[index]
        experts = self.shape.family.experts
        shared = {name: row for name, row in measured.items() if expert_of(name) is None}

        if len(shared) == len(measured):
            with measure_outputs(pair.sparse, shared, batch, dense):
                return self.sparse.leave(pair.sparse, index)

        with (
            measure_outputs(pair.sparse, shared, batch, dense),
            remember_routing(pair.sparse, experts) as seen,
        ):
            output_BTD = self.sparse.leave(pair.sparse, index)

        (routed,) = seen
        measure_experts(self.session, pair.sparse, measured, batch, routed)
        return output_BTD

    def _needs_dense(self, batch: Batch) -> bool:
        return self.session.settings.match_dense or batch.held_out

    def _linear_rows(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> list[LinearRow]:
        groups = pair.input_groups
        rows = []

        for linear in (name for group in groups for name in name_experts(group, len(pair.experts))):
            name = pair.name(linear)
            if linear in pruned:
                asked = self.pruner.shares[pair.dense_name(linear)]
                rows.append(pruned[linear].row(name, asked, self.pruner.quant_of(pair, linear)))
            else:
                rows.append(LinearRow(name=name, sparsity_asked=0.0, sparsity_reached=0.0))

        return rows

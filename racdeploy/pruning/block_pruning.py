"""Prune a model block by block: gather statistics, cut, prune, write, and pass the outputs on.

One block at a time is in memory, as the dense and as the sparse one; linears that share an input
are pruned together. A finished block is a file, so that an interrupted run resumes with the same
result, byte for byte.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import set_parameter
from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expand_experts, find_expert
from racdeploy.models.tensor_coverage import check_known_tensors
from racdeploy.processes.heap import keep_heap
from racdeploy.pruning import ALLOCATION_FILE
from racdeploy.pruning.allocations import Allocation, parse_allocation
from racdeploy.pruning.device import choose_device
from racdeploy.pruning.job_share import WHOLE_SHARE, JobShare
from racdeploy.pruning.structure.cut import (
    BlockCutContext,
    Cut,
    cut_inputs,
    list_cuts,
    narrow_block,
)
from racdeploy.pruning.structure.cut_plan import CutPlan, keep_everything
from racdeploy.pruning.structure.decision import decide_cut_plan
from racdeploy.pruning.walk.assemble import CutShape
from racdeploy.pruning.walk.batches import Batch, make_batches
from racdeploy.pruning.walk.block_files import BlockFiles
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.expert_linears import measure_expert_errors
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.walk.pair import BlockPair
from racdeploy.pruning.walk.pruned_linear import PrunedLinear, measure_outputs, record_outputs
from racdeploy.pruning.walk.relative_error import RelativeError
from racdeploy.pruning.walk.routing import record_routing
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.survey import Effect, Observation, survey
from racdeploy.pruning.weights.patterns import LinearSparsities
from racdeploy.pruning.weights.solving import LinearPruner
from racdeploy.quant import RoundingQuant
from racdeploy.recipe import Pruning, Structure
from racdeploy.results.pruning import BlockRow, LinearRow
from racdeploy.traces.trace import Trace

NO_CUTS = Structure()


def prune_blocks(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],  # traces that decide the pruning
    held_out: Sequence[Trace],  # traces that measure its error
    settings: Pruning,
    folder: Path,  # for the block files; finished ones are reused
    quant: RoundingQuant = "",  # format whose codes are optimized; empty: the export rounds
    keep_existing_zeros: bool = False,  # the checkpoint is sparse, and gets no other zeros
    threads: int = 0,  # 0: torch's choice; all processes use those of the one with the files
    progress: Progress | None = None,
    share: JobShare = WHOLE_SHARE,  # all processes call this alike, with a folder of their own
    structure: Structure = NO_CUTS,  # cut before zeros are chosen
) -> tuple[list[LinearRow], list[BlockRow]]:
    """Prune every block of a checkpoint and leave one safetensors file per block in ``folder``.

    Returns one row per linear, in forward order, and one per block. Removed blocks have no row, and
    the others are renumbered from 0.

    Raises:
        UsageError: there are no calibration traces.
    """
    if not calibration:
        reason = "no calibration traces are left after selection"
        raise UsageError("no-calibration-traces", reason, remedy="collect more traces")

    check_known_tensors(checkpoint)
    keep_heap()
    share.set_threads(threads)

    tasks = sorted({trace.task for trace in (*calibration, *held_out)})
    fitted = make_batches(calibration, tasks, held_out=False)
    batches = fitted + make_batches(held_out, tasks, held_out=True)
    owners = share.assign_owners([batch.ids_BT.numel() for batch in batches])

    blocks = BlockwiseModel(checkpoint, settings.compute, choose_device(settings.device))
    session = PruningSession(
        model=blocks,
        batches=[batches[index] for index in share.list_owned(owners)],
        all_calibration_batches=fitted,
        settings=settings,
        folder=folder,
        share=share,
        progress=progress,
        tasks=tasks,
    )

    with torch.inference_mode():
        outline = decide_cut_plan(session, structure)
        sizes = _count_weights(session, outline.shape(checkpoint.shape, structure))
        shares = _decide_shares(session, sizes)
        pruner = LinearPruner(session, shares, quant, keep_existing_zeros)
        with closing(_Walk(pruner, outline, structure)) as walk:
            return walk.run()


def _decide_shares(session: PruningSession, sizes: Mapping[str, int]) -> LinearSparsities:
    """Return the sparsity of each linear: decide it, or read what an interrupted run decided.

    ``sizes``: weights of each linear after the cut, by its dense name.
    """
    settings = session.settings

    def decide() -> Allocation:
        plugin = plugins.load("allocations", settings.allocation)

        def observe(_: str, weight_OI: Tensor, hessian: Hessian, effect: Effect) -> Observation:
            observation: Observation = plugin.observe(weight_OI, hessian, effect, settings)
            return observation

        observations = survey(session, sizes, observe) if plugin.NEEDS_SURVEY else {}
        shares = plugin.allocate(observations, sizes, settings.sparsity)
        return Allocation(shares, observations)

    return session.decide_once(ALLOCATION_FILE, decide, parse_allocation).sparsities


def _count_weights(session: PruningSession, shape: CutShape) -> dict[str, int]:
    """Count the weights of each linear to prune, after the cut, by its dense name."""
    dense = session.model.shape
    sizes = {}
    for new_index, index in enumerate(shape.blocks):
        for linear in dense.linears[index]:
            name = f"{session.model.prefix(index)}.{linear}"
            if not any(re.search(pattern, name) for pattern in session.settings.ignore):
                cut_shape = widths.tensor_shape(
                    dense.family, f"{linear}.weight", shape.sizes[new_index]
                )
                sizes[name] = math.prod(cut_shape)

    return sizes


class _Walk:
    """Walk of the dense and the sparse model through the blocks, side by side."""

    def __init__(self, pruner: LinearPruner, outline: CutPlan, structure: Structure) -> None:
        self.pruner = pruner
        self.outline = outline
        self.session = pruner.session
        self.batches = self.session.batches
        self.blocks = self.session.model
        self.shape = self.blocks.shape
        self.criterion = plugins.load("criteria", structure.criterion)
        self.cuts = list_cuts(self.shape, outline, structure)
        self.files = BlockFiles(self.session)

        # Hidden states before the next block. The dense model's are computed only where needed.
        self.sparse = CalibrationPass(self.blocks, self.batches, self.session.folder, "sparse")
        self.dense = CalibrationPass(self.blocks, self.batches, self.session.folder, "dense")

    def close(self) -> None:
        """Delete the hidden states."""
        self.sparse.close()
        self.dense.close()

    def run(self) -> tuple[list[LinearRow], list[BlockRow]]:
        """Prune block after block, and read those that are finished."""
        for number, hidden_BTD in enumerate(self.blocks.embed(self.batches)):
            self.sparse.hidden[number] = hidden_BTD
            if self._needs_dense(self.batches[number]):
                self.dense.hidden[number] = hidden_BTD

        linears = []
        blocks = []
        new_indices = {index: new for new, index in enumerate(self.outline.blocks)}

        for index in range(self.shape.block_count):
            if index in new_indices:
                pair = self._load(index, new_indices[index])
                is_finished = self.files.is_finished(pair.new_index)
                linear_rows, block_row = self._restore(pair) if is_finished else self._prune(pair)
                linears += linear_rows
                blocks.append(block_row)
            else:
                self._skip(index)

            self.blocks.meta_block(index).to("meta")  # frees it before the next one is loaded
            self.session.report_progress("prune", index + 1)

        return linears, blocks

    def _load(self, index: int, new_index: int) -> BlockPair:
        """Load a dense block, and a sparse one that shares its tensors until they are replaced."""
        sparse = copy.deepcopy(self.blocks.meta_block(index))
        dense = self.blocks.load_block(index)
        for name, parameter in dense.named_parameters():
            set_parameter(sparse, name, parameter)
        self.blocks.fill_buffers(sparse, index)
        return BlockPair(
            self.blocks.checkpoint,
            dense_index=index,
            new_index=new_index,
            dense=dense,
            sparse=sparse,
            dense_flow=self.dense,
            sparse_flow=self.sparse,
        )

    def _skip(self, index: int) -> None:
        """Advance the dense model alone through a block that was removed."""
        dense = self.blocks.load_block(index)
        for number, batch in enumerate(self.batches):
            if self._needs_dense(batch):
                self.dense.advance(dense, number)

    def _restore(self, pair: BlockPair) -> tuple[list[LinearRow], BlockRow]:
        """Read a finished block, and advance the hidden states."""
        linears, block, kept = self.files.read_rows(pair.new_index)
        for cut in self.cuts:
            if cut.part in kept:
                narrow_block(pair, cut.layouts[pair.new_index], kept[cut.part])

        for name, value in self.files.read_weights(pair.new_index):
            set_parameter(
                pair.sparse, name.removeprefix(pair.new_name("")), self.blocks.to_device(value)
            )

        self._advance(pair, {})
        return linears, block

    def _prune(self, pair: BlockPair) -> tuple[list[LinearRow], BlockRow]:
        """Cut and prune a block group by group, write it, and advance the hidden states."""
        pruned: dict[str, PrunedLinear] = {}
        all_names: list[str] = []

        for group, linears in enumerate(pair.input_groups):
            # Right before its first linears are pruned, so that zeros are chosen in what is left.
            for cut in self.cuts:
                is_cut = cut.counts[pair.new_index] < cut.layouts[pair.new_index].units
                if cut.first_group == group and is_cut:
                    self._cut(pair, cut)

            names = expand_experts(linears, len(pair.experts))
            all_names += names
            wanted = [name for name in names if pair.dense_name(name) in self.pruner.sparsities]
            if wanted:
                pruned |= self.pruner.prune_group(pair, group, wanted)

        self._write_weights(pair, pruned)

        drift = self._advance(pair, pruned)
        self.session.share.add_up(*drift.sums)
        for result in pruned.values():
            self.session.share.add_up(*result.error.sums)

        linear_rows = []
        for linear in all_names:
            name = pair.new_name(linear)
            row = LinearRow(name=name, requested_sparsity=0.0, actual_sparsity=0.0)
            if linear in pruned:
                row = pruned[linear].to_row(name, self.pruner.sparsities[pair.dense_name(linear)])
            linear_rows.append(row)

        block_row = BlockRow(
            block=pair.new_index,
            drift=drift.total,
            drift_by_segment=drift.by_segment,
            drift_by_task=drift.by_task,
        )
        self.files.write_rows(pair.new_index, linear_rows, block_row, pair.kept_units)
        return linear_rows, block_row

    def _cut(self, pair: BlockPair, cut: Cut) -> None:
        """Cut a structure in a block, which units the criterion chooses."""
        plugin = plugins.load("structures", cut.part)
        context = BlockCutContext(
            self.session,
            self.criterion,
            count=cut.counts[pair.new_index],
            pair=pair,
            cut=cut,
        )
        cut_part = getattr(plugin, "cut", cut_inputs)
        pair.kept_units[cut.part] = cut_part(context)

        if cut.linear and pair.dense_name(cut.linear) not in self.pruner.sparsities:
            name = f"{cut.linear}.weight"
            weight_OI = pair.sparse.get_parameter(name)
            stored_OI = weight_OI.to(pair.stored_dtype(name))
            set_parameter(pair.sparse, name, stored_OI.float())  # rounded as in the file

    def _write_weights(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> None:
        named = {pair.new_name(f"{linear}.weight"): row for linear, row in pruned.items()}
        self.files.write_weights(pair.new_index, self._list_cut_tensors(pair), named)

        # For linears without codes, and for the dense model beside the pruned one.
        self.files.write_importance(pair.new_index, named)
        if self.outline == keep_everything(self.shape):
            return

        # Of a model that was cut, also the importance of all dense inputs.
        dense = {}
        for linear, row in pruned.items():
            mean_I = pair.narrowed_importance.get(linear, row.importance_I)
            dense[pair.dense_name(f"{linear}.weight")] = replace(row, importance_I=mean_I)

        self.files.write_importance(pair.new_index, dense, "dense-importance")

    def _list_cut_tensors(self, pair: BlockPair) -> dict[str, Tensor]:
        """Return the tensors that a cut changed, in the stored dtype, by new names.

        Those of experts are all included: with fewer experts they have new indices.
        """
        are_renumbered = len(pair.experts) < self.shape.num_experts

        changed = {}
        for name, parameter in pair.sparse.named_parameters():
            is_renumbered = are_renumbered and find_expert(name) is not None
            if is_renumbered or parameter.shape != pair.dense.get_parameter(name).shape:
                changed[pair.new_name(name)] = parameter.data.to(pair.stored_dtype(name))
        return changed

    def _advance(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> RelativeError:
        """Advance the hidden states through the blocks, and measure errors on held-out batches."""
        drift = RelativeError(self.session.tasks)

        for index, batch in enumerate(self.batches):
            measured = pruned if batch.held_out else {}
            dense_BTD: Tensor | None = None
            outputs: dict[str, Tensor] = {}

            if self._needs_dense(batch):
                narrowed = pair.narrowed_importance.keys() & measured.keys()
                with record_outputs(pair.dense, narrowed) as outputs:
                    dense_BTD = self.dense.advance(pair.dense, index)

            sparse_BTD = self._advance_sparse(pair, index, measured, outputs)
            if batch.held_out and dense_BTD is not None:
                drift.add(sparse_BTD, dense_BTD, batch)

        return drift

    def _advance_sparse(
        self,
        pair: BlockPair,
        index: int,
        measured: Mapping[str, PrunedLinear],
        dense: Mapping[str, Tensor],
    ) -> Tensor:
        """Advance a batch through the sparse block, and add it to the errors of some linears."""
        batch = self.batches[index]
        experts = self.shape.family.experts_module
        shared = {name: row for name, row in measured.items() if find_expert(name) is None}

        with ExitStack() as hooks:
            hooks.enter_context(measure_outputs(pair.sparse, shared, batch, dense))
            passes = []
            if len(shared) < len(measured):
                passes = hooks.enter_context(record_routing(pair.sparse, experts))
            output_BTD = self.sparse.advance(pair.sparse, index)

        for routed in passes:
            measure_expert_errors(self.session, pair.sparse, measured, batch=batch, routed=routed)
        return output_BTD

    def _needs_dense(self, batch: Batch) -> bool:
        return self.session.settings.match_dense or batch.held_out

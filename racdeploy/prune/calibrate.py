"""The walk over the blocks: gather statistics, prune, write, and pass the sparse block's output on.

One block is in memory at a time, dense and partly pruned; linears that share an input go together.
A finished block is a file, so an interrupted walk resumes, and ends byte for byte the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from racdeploy import plugins
from racdeploy.engines.transformers.torch_model import TORCH_DTYPES
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_covered
from racdeploy.prune.allocations import Shares
from racdeploy.prune.batches import Batch, make_batches
from racdeploy.prune.block_files import BlockFiles
from racdeploy.prune.blocks import Blocks, put
from racdeploy.prune.device import choose_device
from racdeploy.prune.flow import Flow
from racdeploy.prune.held_out import RelativeError
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.patterns import Pattern, Within, make_pattern
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.prune.pruned_linear import PrunedLinear, measure_outputs
from racdeploy.prune.refit import prune_and_refit
from racdeploy.prune.rounding import round_to_grid
from racdeploy.prune.session import Progress, Session
from racdeploy.prune.statistics import InputStatistic
from racdeploy.prune.survey import decide_shares
from racdeploy.quant import as_grid
from racdeploy.recipe import Pruning, StreamWeights
from racdeploy.report.model import BlockRow, LinearRow
from racdeploy.storage.heap import keep_heap
from racdeploy.traces.trace import STREAMS, Trace


def prune_blocks(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],  # these decide the pruning
    held_out: Sequence[Trace],  # these only measure it
    settings: Pruning,
    folder: Path,  # finished blocks in it are reused
    weights: StreamWeights | None = None,  # what a token of each stream counts; None is 1 for all
    quant: str = "",  # format whose codes are chosen while pruning; empty leaves that to the export
    within: Path | None = None,  # an earlier walk, whose zeros stay zeros; weights start dense
    threads: int = 0,  # 0 leaves torch's choice; every process uses as many as the first
    progress: Progress | None = None,
    processes: Processes = ALONE,  # each calls this with the same arguments and its own folder
) -> tuple[list[LinearRow], list[BlockRow]]:
    """Prune every block of a checkpoint and leave one safetensors file per block in ``folder``.

    Returns one row per linear, in forward order, and one per block.
    """
    if not calibration:
        reason = "no calibration traces are left after selection"
        raise UsageError(reason, remedy="collect more traces")

    check_covered(checkpoint, settings.dense)
    keep_heap()
    torch.set_num_threads(processes.tell(threads or torch.get_num_threads()))

    tasks = sorted({trace.task for trace in (*calibration, *held_out)})
    fitted = make_batches(calibration, tasks, held_out=False)
    batches = fitted + make_batches(held_out, tasks, held_out=True)
    mine = processes.mine([batch.ids_BT.numel() for batch in batches])
    own = [batches[index] for index in mine]

    blocks = Blocks(checkpoint, settings.compute, choose_device(settings.device))
    counts = weights or StreamWeights()
    weights_R = blocks.place(torch.tensor([getattr(counts, stream) for stream in STREAMS]))
    session = Session(blocks, own, fitted, weights_R, settings, folder, processes, progress)
    earlier = BlockFiles(within, checkpoint, processes) if within else None

    with torch.inference_mode():
        shares = decide_shares(session)
        with closing(_Walk(session, tasks, shares, quant, earlier)) as walk:
            return walk.run()


class _Walk:
    """The dense and the partly pruned model, side by side, on their way through the blocks."""

    def __init__(
        self,
        session: Session,
        tasks: Sequence[str],
        shares: Shares,
        quant: str,
        earlier: BlockFiles | None,
    ) -> None:
        self.session, self.settings, self.processes = session, session.settings, session.processes
        self.blocks, self.batches = session.blocks, session.batches
        self.checkpoint = session.blocks.checkpoint
        self.tasks, self.shares, self.quant, self.earlier = tasks, shares, quant, earlier
        self.method = plugins.load("methods", session.settings.method)
        self.files = BlockFiles(session.folder, self.checkpoint, session.processes)

        # What reaches each block. The dense model is only followed where its states are needed.
        self.sparse = Flow(session.blocks, session.batches, session.folder, "sparse")
        self.dense = Flow(session.blocks, session.batches, session.folder, "dense")

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

        for index in range(self.checkpoint.block_count):
            dense, sparse = self._load(index)
            finished = self.files.is_finished(index)
            pass_block = self._restore_block if finished else self._prune_block
            linear_rows, block_row = pass_block(index, dense, sparse)
            dense.to("meta")

            linears += linear_rows
            blocks.append(block_row)
            self.session.report("prune", index + 1)

        return linears, blocks

    def _load(self, index: int) -> tuple[nn.Module, nn.Module]:
        """Return a dense block, and a second one that begins with the same tensors."""
        sparse = copy.deepcopy(self.blocks.empty(index))
        dense = self.blocks.load(index)
        for name, parameter in dense.named_parameters():
            put(sparse, name, parameter)
        return dense, sparse

    def _restore_block(
        self, index: int, dense: nn.Module, sparse: nn.Module
    ) -> tuple[list[LinearRow], BlockRow]:
        prefix = self.blocks.prefix(index)
        for name, weight_OI in self.files.weights(index):
            put(sparse, name.removeprefix(f"{prefix}."), self.blocks.place(weight_OI))
        self._advance(dense, sparse, {})
        return self.files.rows(index)

    def _prune_block(
        self, index: int, dense: nn.Module, sparse: nn.Module
    ) -> tuple[list[LinearRow], BlockRow]:
        """Prune a block group by group, write it, and advance the hidden states."""
        pruned: dict[str, PrunedLinear] = {}
        prefix = self.blocks.prefix(index)

        for group, linears in enumerate(self.checkpoint.family.input_groups):
            wanted = [linear for linear in linears if f"{prefix}.{linear}" in self.shares]
            if wanted:
                pruned |= self._prune_group(index, dense, sparse, group, wanted)

        named = {f"{prefix}.{linear}.weight": row for linear, row in pruned.items()}
        self.files.write_weights(index, named)
        if not self.quant:  # the export chooses scales by importance, and these are chosen
            self.files.write_importance(index, named)

        drift = self._advance(dense, sparse, pruned)
        for error in (drift, *(linear.error for linear in pruned.values())):
            error.share(self.processes)

        linear_rows = self._linear_rows(prefix, pruned)
        parts = {"drift_by_stream": drift.by_stream, "drift_by_task": drift.by_task}
        block_row = BlockRow(block=index, drift=drift.total, **parts)
        self.files.write_rows(index, linear_rows, block_row)
        return linear_rows, block_row

    def _prune_group(
        self, index: int, dense: nn.Module, sparse: nn.Module, group: int, linears: Sequence[str]
    ) -> dict[str, PrunedLinear]:
        """Prune linears that share an input: each in the process that owns it, then everywhere."""
        names = [f"{self.blocks.prefix(index)}.{linear}" for linear in linears]
        full = [dense.get_parameter(f"{linear}.weight") for linear in linears]
        patterns = [self._pattern(index, name) for name in names]
        owners = self.processes.owners([weight_OI.numel() for weight_OI in full])
        own = [place for place, owner in enumerate(owners) if owner == self.processes.rank]

        statistic = self._gather(dense, sparse, group, full)
        statistic.share(self.processes, owners)
        importance_I, tokens = statistic.importance_I, round(statistic.weight)
        solved = self._solve(own, full, patterns, statistic) if own else {}

        pruned = {}

        for place, linear in enumerate(linears):
            stored = self.checkpoint.entries[f"{names[place]}.weight"].dtype
            if self.quant:  # codes times a scale need more digits than bfloat16 has
                stored = "F32"

            # What another process solved is of the shape of the dense weights.
            weight_OI, target_OI, damping = solved.get(place, (full[place], full[place], 0.0))
            solution = PrunedLinear(
                weight_OI.to(TORCH_DTYPES[stored]).contiguous(),
                target_OI,
                damping,
                RelativeError(self.tasks),
                importance_I,
                tokens,
            )

            match_dense = self.settings.match_dense
            pruned[linear] = solution.spread(self.processes, owners[place], target=match_dense)
            put(sparse, f"{linear}.weight", pruned[linear].stored_OI.float())

        return pruned

    def _gather(
        self, dense: nn.Module, sparse: nn.Module, group: int, full: Sequence[torch.Tensor]
    ) -> InputStatistic:
        """Return the statistic of a group's input, over this process's calibration batches."""
        match = full if self.settings.match_dense else ()
        statistic = InputStatistic(full[0].shape[1], self.session.weights_R, match)

        for index, batch in enumerate(self.batches):
            if batch.held_out:
                continue

            statistic.add(  # no names: a batch's inputs are gone before the next one's are made
                self.sparse.input(sparse, group, index),
                self.dense.input(dense, group, index) if match else None,
                batch.stream_BT,
            )

        return statistic

    def _solve(
        self,
        own: Sequence[int],
        full: Sequence[torch.Tensor],
        patterns: Sequence[Pattern],
        statistic: InputStatistic,
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor, float]]:
        """Return by place in the group: pruned weights, their target, and the damping."""
        hessian = statistic.hessian(self.settings.damping)
        targets = dict(enumerate(full))
        if self.settings.match_dense:
            targets = statistic.targets(own, hessian)

        solved = {}
        for place in own:
            weight_OI = self._prune_linear(targets[place], hessian, patterns[place])
            solved[place] = weight_OI, targets[place], hessian.damping

        return solved

    def _prune_linear(
        self, target_OI: torch.Tensor, hessian: Hessian, pattern: Pattern
    ) -> torch.Tensor:
        live_OI = target_OI * ~hessian.dead_I
        pruned = prune_and_refit(self.method, live_OI, hessian, pattern, self.settings)
        if not self.quant:
            return pruned.weight_OI
        return round_to_grid(pruned, live_OI, hessian, as_grid(self.quant))

    def _pattern(self, index: int, name: str) -> Pattern:
        """Return the zeros that a linear shall have: at least those of the earlier walk."""
        weight = f"{name}.weight"
        self.settings.check_width(name, self.checkpoint.entries[weight].shape[1])
        pattern = make_pattern(self.shares[name], self.settings.kept_of)
        if not self.earlier:
            return pattern

        gone_OI = self.earlier.zeros(index, weight)
        return Within(pattern, self.blocks.place(gone_OI))

    def _advance(
        self, dense: nn.Module, sparse: nn.Module, pruned: Mapping[str, PrunedLinear]
    ) -> RelativeError:
        """Replace the hidden states by the blocks' outputs, and measure on held-out batches."""
        drift = RelativeError(self.tasks)
        for index, batch in enumerate(self.batches):
            with measure_outputs(sparse, pruned if batch.held_out else {}, batch):
                sparse_BTD = self.sparse.leave(sparse, index)
            if self._needs_dense(batch):
                dense_BTD = self.dense.leave(dense, index)
                if batch.held_out:
                    drift.add(sparse_BTD, dense_BTD, batch)

        return drift

    def _needs_dense(self, batch: Batch) -> bool:
        return self.settings.match_dense or batch.held_out

    def _linear_rows(self, prefix: str, pruned: Mapping[str, PrunedLinear]) -> list[LinearRow]:
        rows = []
        for linear in self.checkpoint.family.linears:
            name = f"{prefix}.{linear}"
            if linear in pruned:
                rows.append(pruned[linear].row(name, self.shares[name], self.quant))
            else:
                rows.append(LinearRow(name=name, sparsity_asked=0.0, sparsity_reached=0.0))

        return rows

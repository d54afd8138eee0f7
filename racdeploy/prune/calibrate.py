"""The walk over the blocks: gather statistics, cut, prune, write, and pass the output on.

One block is in memory at a time, dense and partly pruned; linears that share an input go together.
A finished block is a file, so an interrupted walk resumes, and ends byte for byte the same.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from racdeploy import plugins
from racdeploy.decoding.engine import Progress
from racdeploy.engines.transformers.torch_model import TORCH_DTYPES, fit_attention
from racdeploy.errors import UsageError
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_covered
from racdeploy.models.families import expert_of, name_experts
from racdeploy.prune.allocations import Shares
from racdeploy.prune.assemble import Shape
from racdeploy.prune.batches import Batch, make_batches
from racdeploy.prune.block_files import BlockFiles
from racdeploy.prune.blocks import Blocks, put
from racdeploy.prune.cut import BlockPair, Cut, keep_experts, list_cuts, narrow
from racdeploy.prune.decision import decide_outline
from racdeploy.prune.device import choose_device
from racdeploy.prune.experts import ExpertGroup, Piece, count_tokens, measure_experts
from racdeploy.prune.flow import Flow
from racdeploy.prune.held_out import RelativeError
from racdeploy.prune.outline import Outline, whole
from racdeploy.prune.patterns import AsBefore, Pattern, Within, make_pattern
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.prune.pruned_linear import PrunedLinear, measure_outputs, remember_outputs
from racdeploy.prune.removal import Removal
from racdeploy.prune.routing import remember_routing
from racdeploy.prune.session import Session
from racdeploy.prune.solving import Solved, Solver
from racdeploy.prune.statistics import InputStatistic
from racdeploy.prune.survey import decide_shares
from racdeploy.quant import Codes, codes_of
from racdeploy.recipe import Pruning, StreamWeights, Structure
from racdeploy.report.model import BlockRow, LinearRow
from racdeploy.storage.heap import keep_heap
from racdeploy.traces.trace import STREAMS, Trace

WHOLE = Structure()


OWN_ZEROS = Path()
"""In place of an earlier walk: a checkpoint keeps its own zeros and gets no others."""


def prune_blocks(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],  # these decide the pruning
    held_out: Sequence[Trace],  # these only measure it
    settings: Pruning,
    folder: Path,  # finished blocks in it are reused
    weights: StreamWeights | None = None,  # what a token of each stream counts; None is 1 for all
    quant: Codes = "",  # format whose codes are chosen while pruning; empty: the export rounds
    within: Path | None = None,  # an earlier walk, whose cuts and zeros stay, or OWN_ZEROS
    threads: int = 0,  # 0 leaves torch's choice; every process uses as many as the first
    progress: Progress | None = None,
    processes: Processes = ALONE,  # each calls this with the same arguments and its own folder
    structure: Structure = WHOLE,  # what is cut before zeros are chosen
) -> tuple[list[LinearRow], list[BlockRow]]:
    """Prune every block of a checkpoint and leave one safetensors file per block in ``folder``.

    Returns one row per linear, in forward order, and one per block; blocks that are left out have
    none, and the others are numbered anew.
    """
    if not calibration:
        reason = "no calibration traces are left after selection"
        raise UsageError(reason, remedy="collect more traces")

    check_covered(checkpoint)
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

    with torch.inference_mode():
        earlier = None if within == OWN_ZEROS else within
        outline = decide_outline(session, structure, earlier)
        sizes = _count_weights(session, outline.shape(checkpoint, structure))
        plan = _Plan(
            tasks=tasks,
            shares=decide_shares(session, sizes),
            outline=outline,
            cuts=list_cuts(checkpoint, outline, structure),
            by_magnitude=structure.criterion == "magnitude",
            quant=quant,
            keeps_own_zeros=within == OWN_ZEROS,
        )

        with closing(_Walk(session, plan, earlier)) as walk:
            return walk.run()


def _count_weights(session: Session, shape: Shape) -> dict[str, int]:
    """Return how many weights each linear that is pruned has after the cut, by its dense name."""
    blocks = session.blocks
    checkpoint = blocks.checkpoint
    sizes = {}

    for place, index in enumerate(shape.blocks):
        lengths = shape.sizes(checkpoint, place)
        for linear in checkpoint.linears(index):
            name = f"{blocks.prefix(index)}.{linear}"
            if any(re.search(pattern, name) for pattern in session.settings.dense):
                continue

            own = widths.shape(checkpoint.family, f"{linear}.weight", lengths)
            sizes[name] = math.prod(own)

    return sizes


@dataclass(frozen=True)
class _Plan:
    """What was decided before the walk."""

    tasks: Sequence[str]
    shares: Shares
    outline: Outline
    cuts: Sequence[Cut]
    by_magnitude: bool  # whether cuts ask no statistics
    quant: Codes
    keeps_own_zeros: bool  # and gets no others


class _Walk:
    """The dense and the partly pruned model, side by side, on their way through the blocks."""

    def __init__(self, session: Session, plan: _Plan, within: Path | None) -> None:
        self.session = session
        self.settings = session.settings
        self.processes = session.processes
        self.batches = session.batches
        self.blocks = session.blocks
        self.checkpoint = session.blocks.checkpoint

        self.plan = plan
        self.shares = plan.shares
        self.quant = plan.quant
        self.solver = Solver(self.checkpoint, session.settings, plan.tasks)
        self.files = BlockFiles(session.folder, session.processes)
        self.earlier = BlockFiles(within, session.processes) if within else None

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
        places = {index: place for place, index in enumerate(self.plan.outline.blocks)}

        for index in range(self.checkpoint.block_count):
            if index in places:
                pair = self._load(index, places[index])
                linear_rows, block_row = self._pass_block(pair)
                linears += linear_rows
                blocks.append(block_row)
            else:
                self._skip_block(index)

            self.blocks.empty(index).to("meta")
            self.session.report("prune", index + 1)

        return linears, blocks

    def _load(self, index: int, place: int) -> BlockPair:
        """Return a dense block, and a second one that begins with the same tensors."""
        sparse = copy.deepcopy(self.blocks.empty(index))
        dense = self.blocks.load(index)
        for name, parameter in dense.named_parameters():
            put(sparse, name, parameter)
        return BlockPair(index, place, dense, sparse, dict(self.checkpoint.sizes(index)))

    def _skip_block(self, index: int) -> None:
        """Let the dense model alone pass a block that the pruned one is without."""
        dense = self.blocks.load(index)
        for batch in range(len(self.batches)):
            if self._needs_dense(self.batches[batch]):
                self.dense.leave(dense, batch)

    def _pass_block(self, pair: BlockPair) -> tuple[list[LinearRow], BlockRow]:
        if self.files.is_finished(pair.place):
            return self._restore_block(pair)
        return self._prune_block(pair)

    def _restore_block(self, pair: BlockPair) -> tuple[list[LinearRow], BlockRow]:
        prefix = self.blocks.prefix(pair.place)
        if chosen := self.files.kept(pair.place).get("experts"):
            keep_experts(self.checkpoint.family, pair, chosen)

        for name, value in self.files.weights(pair.place):
            put(pair.sparse, name.removeprefix(f"{prefix}."), self.blocks.place(value))

        for cut in self.plan.cuts:
            count = cut.counts[pair.place]
            for letter, width in cut.layouts[pair.place].widths.items():
                pair.sizes[letter] = count * width

        fit_attention(pair.sparse, pair.sizes)

        self._advance(pair, {})
        return self.files.rows(pair.place)

    def _prune_block(self, pair: BlockPair) -> tuple[list[LinearRow], BlockRow]:
        """Cut and prune a block group by group, write it, and advance the hidden states."""
        pruned: dict[str, PrunedLinear] = {}
        routed = self.checkpoint.family.routed

        for group, linears in enumerate(self.checkpoint.input_groups(pair.index)):
            for cut in self.plan.cuts:
                if cut.before == group and not cut.leaves_whole(pair.place):
                    self._cut(pair, cut)

            is_routed = linears[0] in routed
            if is_routed and self.plan.outline.experts(pair.place) < len(pair.experts):
                self._cut_experts(pair)

            names = name_experts(linears, len(pair.experts))
            wanted = [name for name in names if self._name_in_dense(pair, name) in self.shares]
            if wanted:
                prune = self._prune_experts if is_routed else self._prune_group
                pruned |= prune(pair, group, wanted)

        self._write_weights(pair, pruned)

        drift = self._advance(pair, pruned)
        for error in (drift, *(linear.error for linear in pruned.values())):
            error.share(self.processes)

        linear_rows = self._linear_rows(pair, pruned)
        parts = {"drift_by_stream": drift.by_stream, "drift_by_task": drift.by_task}
        block_row = BlockRow(block=pair.place, drift=drift.total, **parts)
        self.files.write_rows(pair.place, linear_rows, block_row, pair.kept)
        return linear_rows, block_row

    def _name_in_dense(self, pair: BlockPair, inside: str) -> str:
        return f"{self.blocks.prefix(pair.index)}.{pair.name_in_dense(inside)}"

    def _quant_of(self, pair: BlockPair, inside: str) -> str:
        """Return the format whose codes a linear gets, or an empty string."""
        return codes_of(self.quant, self._name_in_dense(pair, inside))

    def _cut_experts(self, pair: BlockPair) -> None:
        """Remove those that are missed least, or those that an earlier walk did not keep."""
        if self.earlier:
            chosen = self.earlier.kept(pair.place)["experts"]
        else:
            plugin = plugins.load("structures", "experts")
            count, by_norm = self.plan.outline.units["experts"][pair.place], self.plan.by_magnitude
            chosen = plugin.choose(self.session, self.sparse, pair.sparse, count, by_norm)

        keep_experts(self.checkpoint.family, pair, chosen)

    def _write_weights(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> None:
        prefix = self.blocks.prefix(pair.place)
        named = {f"{prefix}.{linear}.weight": row for linear, row in pruned.items()}

        tensors = self._list_cut_tensors(pair)
        for name, row in named.items():
            tensors[name] = row.stored_OI

        self.files.write_weights(pair.place, tensors)
        if not self.quant:  # the export chooses scales by importance, and these are chosen
            self.files.write_importance(pair.place, named)
            if self.plan.outline != whole(self.checkpoint):
                self._write_dense_importance(pair, pruned)

    def _write_dense_importance(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> None:
        """Write the importance of all inputs, for the model that was cut."""
        prefix = self.blocks.prefix(pair.index)

        named = {}
        for linear, row in pruned.items():
            mean_I = pair.narrowed.get(linear, row.importance_I)
            name = f"{prefix}.{pair.name_in_dense(linear)}.weight"
            named[name] = replace(row, importance_I=mean_I)

        self.files.write_importance(pair.place, named, "dense-importance")

    def _cut(self, pair: BlockPair, cut: Cut) -> None:
        """Choose the units of a part in one process, and narrow the block in all."""
        full_OI = pair.dense.get_parameter(f"{cut.linear}.weight")
        (owner,) = self.processes.owners([full_OI.numel()])

        statistic = self._gather(pair, cut.group, [full_OI], final=False)
        statistic.share(self.processes, [owner])
        pair.narrowed[cut.linear] = statistic.importance_I
        earlier = self.earlier.kept(pair.place)[cut.part] if self.earlier else None

        if self.processes.rank == owner:
            removal = self._remove(pair, cut, statistic, earlier)
            weight_OK = removal.solve()
            units = removal.kept
        else:
            weight_OK = full_OI.new_empty(len(full_OI), cut.width(pair.place))
            units = []

        pair.kept[cut.part] = self.processes.tell(units, owner)
        weight_OK = self.processes.spread(weight_OK, owner)

        if self._name_in_dense(pair, cut.linear) not in self.shares:
            dtype = self._stored_dtype(pair, f"{cut.linear}.weight")
            weight_OK = weight_OK.to(dtype).float()  # as it will be read back

        narrow(self.checkpoint.family, pair, cut, weight_OK)

    def _remove(
        self, pair: BlockPair, cut: Cut, statistic: InputStatistic, earlier: list[int] | None
    ) -> Removal:
        """Remove the units that are missed least, or those that an earlier walk did not keep."""
        by_magnitude = self.plan.by_magnitude
        hessian = statistic.hessian(self.settings.damping)

        target_OI: torch.Tensor = pair.dense.get_parameter(f"{cut.linear}.weight")
        if self.settings.match_dense and not by_magnitude:
            target_OI = statistic.targets([0], hessian)[0]

        layout = cut.layouts[pair.place]
        removal = Removal(target_OI, hessian, layout, by_magnitude=by_magnitude)

        if earlier is not None:
            removal.keep(torch.tensor(earlier))
        else:
            removal.shrink(cut.counts[pair.place])

        return removal

    def _list_cut_tensors(self, pair: BlockPair) -> dict[str, torch.Tensor]:
        """Return what a cut changed, as it is stored, by new names."""
        changed = {}
        for name, parameter in pair.sparse.named_parameters():
            is_moved = "experts" in pair.kept and expert_of(name) is not None
            if is_moved or parameter.shape != pair.dense.get_parameter(name).shape:
                stored = parameter.data.to(self._stored_dtype(pair, name))
                changed[f"{self.blocks.prefix(pair.place)}.{name}"] = stored
        return changed

    def _stored_dtype(self, pair: BlockPair, name: str) -> torch.dtype:
        entry = self.checkpoint.entries[self._name_in_dense(pair, name)]
        return TORCH_DTYPES[entry.dtype]

    def _prune_group(
        self, pair: BlockPair, group: int, linears: Sequence[str]
    ) -> dict[str, PrunedLinear]:
        """Prune linears that share an input: each in the process that owns it, then everywhere."""
        # Dense still, but for what a cut took away.
        full = [pair.sparse.get_parameter(f"{linear}.weight") for linear in linears]
        patterns = [self._pattern(pair, *each) for each in zip(linears, full, strict=True)]
        owners = self.processes.owners([weight_OI.numel() for weight_OI in full])
        own = [place for place, owner in enumerate(owners) if owner == self.processes.rank]

        statistic = self._gather(pair, group, full)
        statistic.share(self.processes, owners)
        quants = [self._quant_of(pair, linear) for linear in linears]
        solved = self.solver.solve(own, linears, full, patterns, statistic, quants) if own else {}

        pruned = {}
        for place, linear in enumerate(linears):
            stored = self._stored_dtype(pair, f"{linear}.weight")
            given = full[place], stored, statistic, solved.get(place)
            found = self.solver.describe(*given, quants[place])
            pruned[linear] = self._spread(pair, linear, found, owners[place])
        return pruned

    def _spread(
        self, pair: BlockPair, linear: str, found: PrunedLinear, owner: int
    ) -> PrunedLinear:
        """Put what one process solved into the sparse block of all."""
        pruned = found.spread(self.processes, owner, target=self.settings.match_dense)
        put(pair.sparse, f"{linear}.weight", pruned.stored_OI.float())
        return pruned

    def _prune_experts(
        self, pair: BlockPair, group: int, linears: Sequence[str]
    ) -> dict[str, PrunedLinear]:
        """Prune linears of experts, as many as their sums leave memory for at a time."""
        if not pair.tokens:
            experts = len(pair.experts)
            pair.tokens = count_tokens(self.session, self.sparse, pair.sparse, experts)

        full = {name: pair.sparse.get_parameter(f"{name}.weight") for name in linears}
        flows, match = (self.sparse, self.dense), self.settings.match_dense
        members = ExpertGroup(self.session, pair, linears, flows, match=match)

        pruned: dict[str, PrunedLinear] = {}
        for pieces in members.split(members.pieces(), full):
            statistics = members.gather(pieces, full)
            pruned |= self._prune_pieces(pair, pieces, statistics, full)
        return pruned

    def _prune_pieces(
        self,
        pair: BlockPair,
        pieces: Sequence[Piece],
        statistics: Sequence[InputStatistic],
        full: Mapping[str, torch.Tensor],
    ) -> dict[str, PrunedLinear]:
        """Prune what one pass has gathered the statistics of."""
        works = [work for piece in pieces for work in piece.works]
        costs = [sum(full[linear].numel() for linear in work) for work in works]
        owners: dict[str, int] = {}
        for work, owner in zip(works, self.processes.owners(costs), strict=True):
            owners |= dict.fromkeys(work, owner)

        # First all sums, then all solutions: no process waits for another's.
        for piece, statistic in zip(pieces, statistics, strict=True):
            statistic.share(self.processes, [owners[linear] for linear in piece.linears])

        solved: dict[str, Solved] = {}

        for piece, statistic in zip(pieces, statistics, strict=True):
            weights = [full[linear] for linear in piece.linears]
            patterns = [self._pattern(pair, linear, full[linear]) for linear in piece.linears]
            mine = [owners[linear] == self.processes.rank for linear in piece.linears]
            own = [place for place, is_own in enumerate(mine) if is_own]
            if own:
                quants = [self._quant_of(pair, linear) for linear in piece.linears]
                given = piece.linears, weights, patterns, statistic, quants
                for place, each in self.solver.solve(own, *given).items():
                    solved[piece.linears[place]] = each

        pruned = {}

        for piece, statistic in zip(pieces, statistics, strict=True):
            for linear in piece.linears:
                stored = self._stored_dtype(pair, f"{linear}.weight")
                solution = solved.pop(linear, None)
                quant = self._quant_of(pair, linear)
                found = self.solver.describe(full[linear], stored, statistic, solution, quant)
                tokens = pair.tokens[expert_of(linear) or 0]
                found = replace(found, routed=tokens, pooled=piece.pooled)
                pruned[linear] = self._spread(pair, linear, found, owners[linear])

        return pruned

    def _gather(
        self, pair: BlockPair, group: int, full: Sequence[torch.Tensor], *, final: bool = True
    ) -> InputStatistic:
        """Return the statistic of a group's input, over this process's calibration batches."""
        match = full if self.settings.match_dense else ()
        linears = self.checkpoint.input_groups(pair.index)[group]
        narrowed = [linear for linear in linears if linear in pair.narrowed and match]
        dense = [pair.dense.get_parameter(f"{linear}.weight") for linear in narrowed]

        width = full[0].shape[1]
        statistic = InputStatistic(width, self.session.weights_R, match, dense)

        for index, batch in enumerate(self.batches):
            if batch.held_out:
                continue

            statistic.add(  # no names: a batch's inputs are gone before the next one's are made
                self.sparse.input(pair.sparse, group, index, final=final),
                self.dense.input(pair.dense, group, index) if match else None,
                batch.stream_BT,
            )

        return statistic

    def _pattern(self, pair: BlockPair, linear: str, weight_OI: torch.Tensor) -> Pattern:
        """Return the zeros that a linear shall have: at least those of the earlier walk."""
        if self.plan.keeps_own_zeros:
            return AsBefore(weight_OI != 0)

        name = self._name_in_dense(pair, linear)
        self.settings.check_width(name, weight_OI.shape[1])
        pattern = make_pattern(self.shares[name], self.settings.kept_of_linear(name))

        if not self.earlier:
            return pattern

        own_name = f"{self.blocks.prefix(pair.place)}.{linear}.weight"
        shape = tuple(weight_OI.shape)
        gone_OI = self.earlier.zeros(pair.place, own_name, shape)
        return Within(pattern, self.blocks.place(gone_OI))

    def _advance(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> RelativeError:
        """Replace the hidden states by the blocks' outputs, and measure on held-out batches."""
        drift = RelativeError(self.plan.tasks)

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
        batch, experts = self.batches[index], self.checkpoint.family.experts
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
        return self.settings.match_dense or batch.held_out

    def _linear_rows(self, pair: BlockPair, pruned: Mapping[str, PrunedLinear]) -> list[LinearRow]:
        prefix = self.blocks.prefix(pair.place)
        groups = self.checkpoint.input_groups(pair.index)
        names = [name for group in groups for name in name_experts(group, len(pair.experts))]

        rows = []

        for linear in names:
            name = f"{prefix}.{linear}"
            if linear not in pruned:
                rows.append(LinearRow(name=name, sparsity_asked=0.0, sparsity_reached=0.0))
                continue

            asked = self.shares[self._name_in_dense(pair, linear)]
            rows.append(pruned[linear].row(name, asked, self._quant_of(pair, linear)))

        return rows

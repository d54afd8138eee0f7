"""The prune stage: prunes block after block on traces; torch is imported when needed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from racdeploy.engines.engine import Progress
from racdeploy.files.stages import Stage, finished_stages
from racdeploy.files.writing import canonical_hash, link_equal, write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workspace import Workspace, describe_code
from racdeploy.pruning import ALLOCATION_FILE, CUT_PLAN_FILE, PrunedModel
from racdeploy.pruning.structures import list_parts
from racdeploy.quant import DENSE_IMPORTANCE_FILE
from racdeploy.quant.stored_codes import UNCODED_FILE
from racdeploy.recipe import Calibration, Pruning, Structure
from racdeploy.results.pruning import BlockRow, CalibrationCounts, LinearRow, StructureRow
from racdeploy.results.schema import FrozenModel
from racdeploy.runtime.template import PromptEncoder
from racdeploy.tasks import TaskSet
from racdeploy.traces.collect import make_prompt_traces
from racdeploy.traces.select import select_traces, take_within_budget
from racdeploy.traces.trace import Trace, count_tokens, hash_ids

_DRAW_RATIO = 1.1  # drawn prompts over expected ones, since their lengths differ


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """Request to prune a model, as it is sent to the other processes of a job.

    Args:
        model: folder of the dense model, or of a sparse one that gets codes.
        structure: cut before zeros are chosen.
        quants: linear → number format whose codes are chosen.
        keep_existing_zeros: the model is sparse, and gets no other zeros.
    """

    model: Path
    calibration: Sequence[Trace]
    held_out: Sequence[Trace]
    structure: Structure
    settings: Pruning
    quants: Mapping[str, str]
    keep_existing_zeros: bool


@dataclass(frozen=True)
class PruningTraces:
    """Traces that decide the pruning, traces that measure its error, and counts of both.

    Args:
        unused: further traces, over the token budget.
    """

    fitted: list[Trace]
    held_out: list[Trace]
    unused: list[Trace]
    counts: CalibrationCounts


class PruningSummary(FrozenModel):
    """Content of ``stage.json`` of a pruned model: rows of the report."""

    structure: tuple[StructureRow, ...]
    linears: tuple[LinearRow, ...]
    blocks: tuple[BlockRow, ...]
    selection: CalibrationCounts

    @classmethod
    def read(cls, stage: Stage) -> Self:
        """Return the summary of a finished stage; ArtifactError if a part is missing."""
        summary = stage.summary
        return cls.model_validate({name: summary[name] for name in cls.model_fields})


@dataclass(frozen=True)
class PruneStage:
    """The stage that makes a dense model sparse, with the codes of some linears.

    Args:
        own_text: text of the model that calibrates, besides its traces.
    """

    workspace: Workspace
    dense: Checkpoint
    encoder: PromptEncoder
    tasks: TaskSet
    trace_seed: int  # of the drawn calibration prompts
    calibration: Calibration
    structure: Structure
    settings: Pruning
    quants: Mapping[str, str]  # linear → number format whose codes are chosen
    name: str  # of the pruned model's folder
    own_text: Sequence[Trace] = ()

    def run(self, traces: Sequence[Trace], traces_sha256: str) -> PrunedModel:
        """Prune the model on its traces, or return it pruned earlier."""
        from racdeploy.pruning.device import choose_device

        # "auto" is resolved first: another device computes other weights, so it decides the folder.
        device = choose_device(self.settings.device).type
        settings = self.settings.model_copy(update={"device": device})
        identity = {"traces_sha256": traces_sha256, "structure": self._cuts.model_dump()}
        stage = self._run(
            "prune", self.name, self.dense, settings=settings, traces=traces, identity=identity
        )
        summary = PruningSummary.read(stage)
        notes = (note_held_out(summary.selection), note_experts(summary.linears))

        return PrunedModel(
            stage.folder / self.name,
            settings.sparsity,
            linears=summary.linears,
            blocks=summary.blocks,
            selection=summary.selection,
            notes=tuple(note for note in notes if note),
            structure=summary.structure,
        )

    def choose_codes(self, model: Path, traces: Sequence[Trace], name: str) -> Path:
        """Choose the codes of a sparse model after its recovery; return the folder.

        Its zeros are kept, and rounding errors are compensated against its own outputs.
        """
        sparse = Checkpoint(model)
        settings = self.settings.without_zeros()
        identity = {"sparse": sparse.sha256, "traces": hash_ids(traces)}
        stage = self._run(
            "codes", name, sparse, settings=settings, traces=traces, identity=identity
        )
        return stage.folder / name

    def _run(
        self,
        label: str,
        name: str,
        model: Checkpoint,
        *,
        settings: Pruning,
        traces: Sequence[Trace],
        identity: Mapping[str, object],
    ) -> Stage:
        """Return the finished stage that has the pruned model in a folder of that name.

        Args:
            label: name of the stage.
            identity: its inputs, besides the settings and the code.
        """
        inputs = describe_code(self) | {
            **identity,
            "tasks": self.tasks.identify_calibration(),
            "calibration": self.calibration.model_dump(),
            "prune": settings.model_dump(),
        }
        if self.own_text:
            inputs["own_text"] = hash_ids(self.own_text)
        formats = {
            "quants": sorted({*self.quants.values()}),
            "quant_by_linear": canonical_hash(self.quants),
        }
        stage = self.workspace.open(label, inputs | formats)
        folder = stage.folder / name
        if not stage.is_finished:
            self._share_survey(stage, label, formats)
            summary = self._walk(folder, settings, traces, model)
            stage.finish(summary.model_dump())
            # What neither number format nor cut changes is stored once. Folders without codes are
            # left alone: users edit their files.
            for other in finished_stages(self.workspace.work, label):
                for twin in other.folder.glob(f"*/{UNCODED_FILE}"):
                    link_equal(twin, folder / twin.name)

        # The files of single blocks, for a resume, were half of the stage's size.
        for file in stage.folder.glob("*-[0-9]*.safetensors"):
            file.unlink()
        return stage

    def _share_survey(self, stage: Stage, label: str, formats: Mapping[str, object]) -> None:
        """Copy what was decided for other number formats: it does not depend on them."""
        own_hash = canonical_hash(stage.inputs)
        for other in finished_stages(self.workspace.work, label):
            if canonical_hash({**other.inputs, **formats}) != own_hash:
                continue

            for name in (CUT_PLAN_FILE, ALLOCATION_FILE):
                if not (stage.folder / name).exists():
                    write_atomic(stage.folder / name, (other.folder / name).read_bytes())

    def choose_traces(self, traces: Sequence[Trace]) -> PruningTraces:
        """Return the traces to prune on, or as many tokens of prompts, and those held out."""
        selection = select_traces(traces, self.calibration)
        chosen = selection.calibration
        tokens = count_tokens(chosen)
        if self.calibration.source == "prompt":
            # Prompts alone get as many tokens as whole traces, so that only the source differs.
            mean = sum(len(trace.prompt_ids) for trace in traces) / len(traces)
            count = math.ceil(_DRAW_RATIO * tokens / mean)
            drawn = self.tasks.draw("calibration", self.trace_seed, count)
            held_out = {trace.question for trace in selection.held_out}
            fresh = [problem for problem in drawn if problem.question not in held_out]
            chosen = take_within_budget(make_prompt_traces(self.encoder, fresh), tokens)

        held_out_tasks = {trace.task for trace in selection.held_out}
        counts = CalibrationCounts(
            source=self.calibration.source,
            calibration_traces=len(chosen),
            calibration_tokens=count_tokens(chosen),
            rac_tokens=tokens,
            held_out_traces=len(selection.held_out),
            tasks_not_held_out=sorted({trace.task for trace in traces} - held_out_tasks),
            left_out=selection.excluded,
        )

        return PruningTraces(chosen, selection.held_out, selection.unused, counts)

    def run_as_follower(self, request: PruneRequest) -> None:
        """Do the share of a process other than the first one."""
        with self.workspace.scratch() as scratch:
            self._prune_blocks(scratch, request)

    @property
    def _cuts(self) -> Structure:
        """The structure without parts that are cut last, by rewriting the folder."""
        keep = dict(self.structure.keep)
        for part in list_parts(self.structure, "folder"):
            del keep[part]
        return self.structure.model_copy(update={"keep": keep, "vocabulary_text": ()})

    def _walk(
        self,
        folder: Path,
        settings: Pruning,
        traces: Sequence[Trace],
        model: Checkpoint,
    ) -> PruningSummary:
        """Prune a dense model, or choose the codes of a sparse one, into a folder."""
        self.workspace.report("prune", 0, model.shape.block_count)

        from racdeploy.pruning.structure.cut_plan import list_structure_rows, read_cut_plan
        from racdeploy.pruning.walk.assemble import assemble

        # Structure is cut only once; a sparse model comes here for its codes, and keeps its zeros.
        is_dense = model.folder == self.dense.folder
        cuts = self._cuts if is_dense else Structure()
        chosen = self.choose_traces(traces)
        request = PruneRequest(
            model=model.folder.resolve(),
            calibration=[*chosen.fitted, *self.own_text],
            held_out=chosen.held_out,
            structure=cuts,
            settings=settings,
            quants=self.quants,
            keep_existing_zeros=not is_dense,
        )

        blocks_folder = folder.parent
        with self.workspace.announce(request, self):
            linears, blocks = self._prune_blocks(blocks_folder, request, self.workspace.progress)

        shape = read_cut_plan(blocks_folder).shape(model.shape, cuts)
        assemble(model, blocks_folder, folder, shape)
        # That of the dense model: a folder that was cut before has one of a larger model.
        dense_importance = model.folder / DENSE_IMPORTANCE_FILE
        if not is_dense and dense_importance.is_file():
            shutil.copyfile(dense_importance, folder / DENSE_IMPORTANCE_FILE)

        return PruningSummary(
            structure=list_structure_rows(model.shape, shape),
            linears=tuple(linears),
            blocks=tuple(blocks),
            selection=chosen.counts.model_copy(
                update={"own_text_tokens": count_tokens(self.own_text)}
            ),
        )

    def _prune_blocks(
        self, folder: Path, request: PruneRequest, progress: Progress | None = None
    ) -> tuple[list[LinearRow], list[BlockRow]]:
        """Prune the blocks of a request into a folder, together with the other processes."""
        from racdeploy.pruning.block_pruning import prune_blocks

        return prune_blocks(
            checkpoint=Checkpoint(request.model),
            calibration=request.calibration,
            held_out=request.held_out,
            settings=request.settings,
            folder=folder,
            quant=request.quants,
            keep_existing_zeros=request.keep_existing_zeros,
            threads=self.workspace.threads,
            progress=progress,
            share=self.workspace.share,
            structure=request.structure,
        )


def note_experts(linears: Sequence[LinearRow]) -> str:
    """Return a sentence on the calibration tokens of experts; empty without experts."""
    routed = [row for row in linears if row.tokens is not None]
    tokens = {row.name.rpartition(".")[0]: row.tokens or 0 for row in routed}
    pooled = [row for row in routed if row.pooled]

    if not tokens:
        return ""

    # Experts see only the tokens sent to them; too few make a poor statistic.
    fewest = min(tokens, key=tokens.__getitem__)
    median = sorted(tokens.values())[len(tokens) // 2]
    note = (
        f"{len(tokens):,} experts were pruned on {tokens[fewest]:,} calibration tokens ({fewest}) "
        f"to {max(tokens.values()):,} each, {median:,} in the middle"
    )
    if pooled:
        note += (
            f"; these were too few for {len(pooled):,} of {len(routed):,} linears, which were "
            "pruned on the tokens of all experts of their block (pooled in report.json)"
        )
    return note


def note_held_out(counts: CalibrationCounts) -> str:
    """Return a sentence on tasks without held-out traces; empty if all have some."""
    missing = ", ".join(counts.tasks_not_held_out)
    if not missing:
        return ""

    task_note = f" of {missing}" if counts.held_out_traces else ""
    return (
        f"no trace{task_note} is held out, so no error{task_note} was measured; "
        "raise traces.count or calibration.held_out_share"
    )

"""The prune stage: one walk over the blocks on traces; torch is imported when needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.engines.engine import Progress
from racdeploy.files.stages import scratch_folder
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workplace import COMPUTING, Workplace, address
from racdeploy.prune import PrunedModel
from racdeploy.prune.structures import list_parts
from racdeploy.quant import Codes
from racdeploy.recipe import Calibration, Pruning, Structure
from racdeploy.results.pruning import BlockRow, LinearRow, StructureRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.tasks import TaskSet
from racdeploy.traces.collect import prompt_traces
from racdeploy.traces.select import select, within_budget
from racdeploy.traces.trace import Trace, count_tokens, hash_ids

_SPARE_PROMPTS = 1.1  # prompts differ in length, so a few more are drawn than the mean asks for


@dataclass(frozen=True)
class PruneStage:
    """A dense model on its way to a sparse one, for the number format ``quant`` where joint."""

    place: Workplace
    dense: Checkpoint
    encoder: PromptEncoder
    tasks: TaskSet
    trace_seed: int  # decides the calibration prompts that are drawn
    calibration: Calibration
    structure: Structure
    settings: Pruning
    quant: Codes
    name: str  # of the pruned model's folder

    def run(self, traces: Sequence[Trace], traces_sha256: str) -> PrunedModel:
        """Prune the model on its traces, or find it pruned."""
        from racdeploy.prune.device import choose_device

        device = choose_device(self.settings.device).type
        settings = self.settings.model_copy(update={"device": device})
        decides = {"traces_sha256": traces_sha256, "structure": self._cuts.model_dump()}
        folder, summary = self._run("prune", self.name, decides, settings, traces, self.dense)
        linears = tuple(LinearRow.model_validate(row) for row in summary["linears"])
        notes = (note_held_out(summary["selection"]), note_experts(linears))

        return PrunedModel(
            folder,
            settings.sparsity,
            linears,
            tuple(BlockRow.model_validate(row) for row in summary["blocks"]),
            summary["selection"],
            tuple(filter(None, notes)),
            structure=tuple(StructureRow.model_validate(row) for row in summary["structure"]),
        )

    def choose_codes(self, model: Path, traces: Sequence[Trace], name: str) -> Path:
        """Choose the codes of ``quant`` for a sparse model whose values are done, or find them.

        Its zeros stay, and rounding is compensated for its own outputs. Returns the folder.
        """
        sparse = Checkpoint(model)
        unlimited = {"sparsity": 0.0, "pattern": "unstructured", "allocation": "uniform"}
        settings = self.settings.model_copy(update={**unlimited, "shares": {}})
        decides = {"sparse": sparse.sha256, "traces": hash_ids(traces)}
        folder, _ = self._run("codes", name, decides, settings, traces, sparse)
        return folder

    def _run(
        self,
        label: str,
        name: str,
        decides: Mapping[str, Any],
        settings: Pruning,
        traces: Sequence[Trace],
        model: Checkpoint,
    ) -> tuple[Path, Mapping[str, Any]]:
        """Return the folder of that name in a stage, and its summary."""
        inputs = self.describe_code() | {
            **decides,
            "tasks": self.tasks.identify_calibration(),
            "calibration": self.calibration.model_dump(),
            "prune": settings.model_dump(),
            "quant": self.quant,
        }
        stage = self.place.open(label, inputs)
        folder = stage.folder / name
        if not stage.finished:
            stage.finish(self._walk(folder, settings, traces, model))
        return folder, stage.summary

    def select(self, traces: Sequence[Trace]) -> tuple[list[Trace], list[Trace], dict[str, Any]]:
        """Return calibration and held-out traces, and counts of both and of what was left out."""
        selection = select(traces, self.calibration)
        chosen = selection.calibration
        tokens = count_tokens(chosen)
        if self.calibration.source == "prompt":
            held_out = {trace.question for trace in selection.held_out}
            chosen = self._draw_prompts(traces, tokens, held_out)

        held_out_tasks = {trace.task for trace in selection.held_out}
        counts = {
            "source": self.calibration.source,
            "calibration_traces": len(chosen),
            "calibration_tokens": count_tokens(chosen),
            "rac_tokens": tokens,
            "held_out_traces": len(selection.held_out),
            "tasks_not_held_out": sorted({trace.task for trace in traces} - held_out_tasks),
            "left_out": selection.left_out,
        }

        return chosen, selection.held_out, counts

    def describe_code(self) -> dict[str, str]:
        """Return what all processes that prune together must have in common."""
        return address(__name__, COMPUTING) | {"model": self.dense.sha256}

    def share(self, given: Mapping[str, Any]) -> None:
        """Do the share of a process that follows the first one."""
        with scratch_folder(self.place.work, self.place.processes.rank) as scratch:
            self._prune_blocks(scratch, given)

    @property
    def _cuts(self) -> Structure:
        """The structure without what is rewritten once everything else is done."""
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
    ) -> dict[str, Any]:
        """Prune a model, the dense one or one that is sparse already, into a folder."""
        self.place.report("prune", 0, model.shape.block_count)

        from racdeploy.prune.structure.outline import list_rows, read_outline
        from racdeploy.prune.walk.assemble import assemble

        calibration, held_out, counts = self.select(traces)
        cuts = self._cuts if model is self.dense else Structure()
        given = {
            "checkpoint": model.folder.resolve(),
            "calibration": calibration,
            "held_out": held_out,
            "structure": cuts,
            "settings": settings,
            "weights": self.calibration.weights,
            "quant": self.quant,
            "keeps_own_zeros": model is not self.dense,
        }

        blocks_folder = folder.parent
        with self.place.processes.job("prune", self.describe_code(), given):
            linears, blocks = self._prune_blocks(blocks_folder, given, self.place.progress)

        shape = read_outline(blocks_folder).shape(model.shape, cuts)
        assemble(model, blocks_folder, folder, shape)

        return {
            "structure": [row.model_dump() for row in list_rows(model.shape, shape)],
            "linears": [row.model_dump() for row in linears],
            "blocks": [row.model_dump() for row in blocks],
            "selection": counts,
        }

    def _prune_blocks(
        self, folder: Path, given: Mapping[str, Any], progress: Progress | None = None
    ) -> tuple[list[LinearRow], list[BlockRow]]:
        from racdeploy.prune.calibrate import prune_blocks

        return prune_blocks(
            folder=folder,
            threads=self.place.threads,
            progress=progress,
            processes=self.place.processes,
            **{**given, "checkpoint": Checkpoint(given["checkpoint"])},
        )

    def _draw_prompts(
        self, traces: Sequence[Trace], tokens: int, held_out: set[str]
    ) -> list[Trace]:
        """Return prompts of about so many tokens, without the questions that are held out."""
        mean = sum(len(trace.prompt_ids) for trace in traces) / len(traces)
        count = math.ceil(_SPARE_PROMPTS * tokens / mean)
        drawn = self.tasks.draw("calibration", self.trace_seed, count)

        fresh = [problem for problem in drawn if problem.question not in held_out]
        return within_budget(prompt_traces(self.encoder, fresh), tokens)


def note_experts(linears: Sequence[LinearRow]) -> str:
    """Return how many calibration tokens experts had, and which had too few; empty without any."""
    routed = [row for row in linears if row.tokens is not None]
    tokens = {row.name.rpartition(".")[0]: row.tokens or 0 for row in routed}
    pooled = [row for row in routed if row.pooled]

    if not tokens:
        return ""

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


def note_held_out(selection: Mapping[str, Any]) -> str:
    """Return which tasks have no error on held-out traces; empty where all have."""
    missing = ", ".join(selection["tasks_not_held_out"])
    if not missing:
        return ""

    of_tasks = f" of {missing}" if selection["held_out_traces"] else ""
    return (
        f"no trace{of_tasks} is held out, so no error{of_tasks} was measured; "
        "raise traces.count or calibration.held_out_share"
    )

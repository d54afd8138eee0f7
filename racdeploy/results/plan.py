"""The plan of a run: what it makes, what it costs and what it can show, known before any work.

Each part is filled in by the module that knows it; printing and the forecast read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from racdeploy.plugins import Names


@dataclass(frozen=True, kw_only=True)
class ArtifactPlan:
    """Artifact of a build: its model and format, and the most that traces and answers cost.

    Args:
        model: folder or id of the dense model.
        linears_kept_dense: prunable linears that get no zeros.
        traces_from: server or engine that answers the calibration prompts.
        trace_tokens_enough: tokens of traces that are enough; 0 for those of all prompts.
        answer_limit: tokens of an answer.
        finds_limit: the first answers show whether it is enough.
        evaluation_models: models that answer the evaluation prompts.
        cache_bytes: keys and values of one sequence.
        artifact: name of the artifact, without suffix.
        zeros_lost: how many linears do not keep their zeros; empty if all do.
        evaluation_cuts: sentences on tasks whose thinking is longer than its limit.
        token_differences: what an engine tokenizes differently; empty for nothing.
    """

    model: str
    architecture: str
    parameters: int
    linears_pruned: int
    linears_kept_dense: int
    thinks: bool
    traces_from: str
    trace_prompts: int
    trace_tokens_at_most: int
    trace_tokens_enough: int
    answer_limit: int
    finds_limit: bool
    evaluation_models: int
    evaluation_tokens_at_most: int
    artifact_bytes: int
    disk_bytes: int
    cache_bytes: int
    verify_memory_bytes_at_least: int
    artifact: str
    zeros_lost: str = ""
    evaluation_cuts: Names = ()
    token_differences: str = ""


@dataclass(frozen=True, kw_only=True)
class StructurePlan:
    """The model that a cut leaves.

    Args:
        note: remarks on model, tasks and recipe; empty for none.
        parameters_left: None if nothing is cut.
        keeps: the remaining structure, in words.
        costs: sentences on cuts that cost a published model much.
    """

    note: str = ""
    parameters_left: int | None = None
    keeps: str = ""
    costs: Names = ()


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Calibration of pruning, and peak memory of it and of answering.

    Args:
        is_bound: True before there are traces; then tokens and memory are upper bounds.
        own_text_tokens: how many of the tokens the model writes without a prompt.
        asks: sources of the tasks' problems.
        trace_cuts: sentences on tasks whose thinking is longer than its limit.
        trace_memory_bytes_at_most: None if the traces exist, or a server answers.
    """

    prune_tokens: int
    prune_memory_bytes: int
    is_bound: bool
    own_text_tokens: int = 0
    asks: Names = ()
    trace_cuts: Names = ()
    trace_memory_bytes_at_most: int | None = None


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """Training of the pruned model; its tokens are 0 if only the thinking is shortened.

    Args:
        recover_phases: names and tokens of the phases, in order.
        shorten_answers_at_most: answers that the dense model learns from before it is pruned.
    """

    recover_tokens: int
    recover_phases: str
    recover_memory_bytes_at_most: int
    shorten_answers_at_most: int = 0


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Rough seconds of each stage; empty where they cannot be estimated.

    Args:
        answer_tokens: mean tokens of an answer, known or assumed.
    """

    stage_seconds: Mapping[str, float]
    answer_tokens: int = 0

    @property
    def seconds_expected(self) -> float | None:
        """Seconds of all stages together; None if they are unknown."""
        return sum(self.stage_seconds.values()) or None


@dataclass(frozen=True, kw_only=True)
class BundlePlan:
    """A finished bundle that is verified, and where the answers of its dense model come from."""

    bundle: str
    tier: str
    dense_answers: str
    harness: str = ""


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """Names of the models that are compared."""

    reference: str
    candidates: Names


@dataclass(frozen=True, kw_only=True)
class PowerPlan:
    """Statistical power of a verification, and the smallest losses that it can detect.

    Args:
        discordant_share: expected share of prompts on which only one model is right.
        accuracy_power: probability that a model as good as the dense one passes.
        smallest_detectable_ratio: of thinking lengths; None for a single prompt.
        judged_after: numbers of prompts after which a clear verdict ends the questions; empty if
            all are asked at once.
        expected_prompts: asked on average if both models are equally good; 0 for all.
    """

    evaluation_prompts: int
    samples: int
    discordant_share: float
    accuracy_margin: float
    accuracy_power: float
    smallest_detectable_drop: float
    length_ratio: float
    smallest_detectable_ratio: float | None
    judged_after: tuple[int, ...] = ()
    expected_prompts: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run; parts that do not belong to it are None.

    Args:
        rungs: models of a ladder, the widest first; empty for a build of one model.
        download: number format of the file that a rung is compared with.
        trace_server_model: name of the model that a trace server answers with.
        tokens_at_most: tokens of all answers of a verification or comparison.
    """

    rungs: Names = ()
    download: str = ""
    artifact: ArtifactPlan | None = None
    trace_server_model: str = ""
    structure: StructurePlan | None = None
    pruning: PruningPlan | None = None
    recovery: RecoveryPlan | None = None
    time: TimePlan | None = None
    bundle: BundlePlan | None = None
    comparison: ComparisonPlan | None = None
    tokens_at_most: int | None = None
    power: PowerPlan | None = None

    @property
    def peak_memory_bytes(self) -> dict[str, int]:
        """Peak memory of each stage that is planned."""
        peaks = {}
        if self.pruning and self.pruning.trace_memory_bytes_at_most:
            peaks["trace"] = self.pruning.trace_memory_bytes_at_most
        if self.pruning:
            peaks["prune"] = self.pruning.prune_memory_bytes
        if self.recovery:
            peaks["recover"] = self.recovery.recover_memory_bytes_at_most
        if self.artifact:
            peaks["verify"] = self.artifact.verify_memory_bytes_at_least
        return peaks

    def to_json(self) -> dict[str, object]:
        """Return all values in one object; optional ones are left out where they say nothing."""
        values: dict[str, object] = {}
        if self.rungs:
            values |= {"rungs": self.rungs, "no_worse_than": self.download}
        parts = (
            self.artifact, self.structure, self.pruning, self.recovery, self.bundle,
            self.comparison, self.power,
        )  # fmt: skip
        for part in parts:
            values |= _list_values(part)

        if self.trace_server_model:
            values["trace_server_model"] = self.trace_server_model
        if self.tokens_at_most is not None:
            values["tokens_at_most"] = self.tokens_at_most
        if self.pruning and values.pop("is_bound"):
            for name in ("prune_tokens", "prune_memory_bytes"):
                values[f"{name}_at_most"] = values.pop(name)
        if self.time:
            values["stage_seconds"] = dict(self.time.stage_seconds)
            values["seconds_expected"] = self.time.seconds_expected
        return values


def _list_values(part: Any) -> dict[str, object]:
    """Return the values of a part's fields, without those that have their default."""
    values = {}
    for each in fields(part) if part else ():
        value = getattr(part, each.name)
        if each.default is MISSING or value != each.default:
            values[each.name] = value
    return values

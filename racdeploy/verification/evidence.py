"""Evidence: the measurements of a verification, and the checks that decide on them.

A check is a file of ``checks/`` with ``check(evidence) -> Outcome`` and, if it has limits, a
class ``Limits``, its table in the gate. ``run_checks`` runs every file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from racdeploy import plugins
from racdeploy.engines.engine import Ids
from racdeploy.errors import UsageError
from racdeploy.recipe import Verification
from racdeploy.results.answers import AnswerRecord, HarnessRun
from racdeploy.results.checks import CheckResult, CheckVerdict
from racdeploy.results.pruning import TensorRow
from racdeploy.results.report import BUILT_ROLES
from racdeploy.verification.gate import Gate
from racdeploy.verification.stats import lengths, paired
from racdeploy.verification.stats.verdicts import RatioEstimate

T = TypeVar("T")
Predicate = Callable[[AnswerRecord], bool]
is_correct: Predicate = attrgetter("correct")
thinking_tokens: Callable[[AnswerRecord], int] = attrgetter("thinking_tokens")
FAULTS: dict[str, Predicate] = {
    "unclosed": lambda record: record.state == "open",
    "loops": lambda record: record.loop_tokens > 0,
    "forced": lambda record: record.state == "forced",
    "truncated": lambda record: record.state != "open" and record.finish_reason == "length",
}
"""Faults of a completion, each with its test."""


def completion_tokens(record: AnswerRecord) -> int:
    """Return the tokens of thinking and answer together."""
    return record.thinking_tokens + record.answer_tokens


@dataclass(frozen=True)
class ArmResult:
    """Result of one arm: a compared model's answers, files and figures.

    Args:
        records: one per prompt and sample, in that order.
        size_bytes: of the artifact; None if it is unknown, as behind a server.
        sparsity: zeros over the prunable weights in the file, 0 to 1.
        stats: engine counters: ``load_ms``, ``generated_tokens``, ``decode_s``, …
        files: SHA-256 of each file.
        kernels: kernels that ran, in the engine's words.
    """

    name: str
    records: tuple[AnswerRecord, ...] = ()
    size_bytes: int | None = None
    quant: str = ""
    sparsity: float | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    kernels: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens decoded per second; None if not measured."""
        decode_s = self.stats.get("decode_s")
        return self.stats.get("generated_tokens", 0.0) / decode_s if decode_s else None

    def take(self, prompts: int) -> ArmResult:
        """Return the arm with its answers to the first prompts."""
        records = tuple(record for record in self.records if record.prompt < prompts)
        return replace(self, records=records)

    def count(self, predicate: Predicate) -> int:
        """Count the records for which a test holds."""
        return sum(map(predicate, self.records))

    def group_by_prompt(self, value: Callable[[AnswerRecord], T]) -> list[list[T]]:
        """Return a value of every record, as one row of samples for each prompt."""
        rows: dict[int, list[T]] = {}
        for record in self.records:
            rows.setdefault(record.prompt, []).append(value(record))
        return list(rows.values())

    def count_disagreements(self, other: ArmResult, predicate: Predicate) -> paired.PairedCounts:
        """Count the prompts for which a test holds in one arm only; ``n10`` is this one only."""
        return paired.paired_counts(
            self.group_by_prompt(predicate), other.group_by_prompt(predicate)
        )

    def length_ratio(
        self,
        other: ArmResult,
        length: Callable[[AnswerRecord], int],
        budget_tokens: int,
        confidence: float,
    ) -> RatioEstimate:
        """Return the ratio of mean lengths up to the budget, of the other arm to this one."""
        return lengths.length_ratio(
            self.group_by_prompt(length), other.group_by_prompt(length), budget_tokens, confidence
        )


@dataclass(frozen=True)
class OtherArtifact:
    """Pruned model for another engine in the same bundle; files as in :class:`Evidence`."""

    arm: ArmResult
    backend: str
    artifact: Path
    artifact_files: Mapping[str, str]


@dataclass(frozen=True)
class TokenProbe:
    """Text with the tokenizer's ids (``expected``) and the engine's ids (``actual``)."""

    text: str
    expected: Ids
    actual: Ids


@dataclass(frozen=True)
class PromptProbe:
    """Question with the prompt ids of transformers, of the bundle and of the artifact.

    Args:
        expected: ids by transformers, or as the bundle recorded them.
        rendered: ids by the bundle's template.
        artifact: ids by the artifact's own template; None if it has none.
        bos_ids: beginning-of-sequence that the tokenizer adds and a template may leave out.
    """

    question: str
    expected: Ids
    rendered: Ids
    artifact: Ids | None
    bos_ids: Ids


@dataclass(frozen=True)
class StopIds:
    """End-of-sequence ids of the checkpoint, and the artifact's ``eos_token_id`` or None.

    Args:
        expected: that of most answers comes first.
        known: all ids that end a candidate's answers; empty if only ``actual`` is known.
    """

    expected: Ids
    actual: int | None
    known: Ids = ()


class Divergence(NamedTuple):
    """Divergence of a model from a reference, averaged over positions.

    Args:
        kl: mean KL(reference ‖ other) in nats.
        top1: share of positions with the same most likely token.
        changed: share of positions at which the reference gives the other model's first choice
            less than half the probability of its own.
    """

    kl: float
    top1: float
    changed: float


@dataclass(frozen=True)
class LogitComparison:
    """Teacher-forced comparison on the dense model's own traces, over completion tokens.

    Args:
        tokens: positions compared.
        export: divergence of the artifact from the pruned checkpoint under torch, or of a
            candidate from its reference.
        pruning: divergence of the pruned checkpoint from the dense one; None in a comparison.
        traces: traces compared; with a smaller vocabulary only those without removed tokens.
        lost_mass: mean probability that the dense model gives to removed tokens.
    """

    tokens: int
    export: Divergence
    pruning: Divergence | None = None
    traces: int = 0
    lost_mass: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Measurements of a model besides its answers; None or empty stands for "not measured".

    Args:
        requested_sparsity: share of zeros over the prunable weights that the last kept pruning
            step asked for.
        prunable: names of the artifact's prunable tensors.
        probes: None if the engine has no tokenizer of its own.
        token_differences: share of the probes that may differ, 0 to 1.
        other_artifacts: the pruned model for the bundle's other engines.
        rivals: dense models in other quants; no check looks at them.
        stop_ids: None if the artifact holds no tokenizer.
        open_tags: tags before the thoughts of both models; empty without one.
        skip_reasons: reasons why a check has nothing to decide on, by its name.
        harness: run of an evaluation harness; None if there was none.
        roles: words for both arms.
    """

    requested_sparsity: float = 0.0
    tensors: tuple[TensorRow, ...] = ()
    prunable: frozenset[str] = frozenset()
    dense_linears: frozenset[str] = frozenset()
    probes: tuple[TokenProbe, ...] | None = ()
    token_differences: float = 0.0
    logits: LogitComparison | None = None
    other_artifacts: tuple[OtherArtifact, ...] = ()
    rivals: tuple[ArmResult, ...] = ()
    prompts: tuple[PromptProbe, ...] = ()
    stop_ids: StopIds | None = None
    open_tags: tuple[str, str] = ("", "")
    packing: str = "plain"
    skip_reasons: Mapping[str, str] = field(default_factory=dict)
    harness: HarnessRun | None = None
    roles: tuple[str, str] = BUILT_ROLES


@dataclass(frozen=True, kw_only=True)
class Evidence(Findings):
    """Everything that the checks decide on: the answers of both models, and the findings.

    ``Examiner.weigh`` is the only place that makes one.

    Args:
        artifact_files: recorded SHA-256 of each file, by its path from the main file's folder.
        planned: prompts that might have been asked; 0 if they are judged once.
    """

    settings: Verification
    gate: Gate
    dense: ArmResult
    pruned: ArmResult
    backend: str = ""
    artifact: Path = Path()
    artifact_files: Mapping[str, str] = field(default_factory=dict)
    planned: int = 0

    def choose(self, built: str, compared: str) -> str:
        """Return the words for a bundle, or those for a comparison of other models."""
        return built if self.roles == BUILT_ROLES else compared

    @property
    def prompt_count(self) -> int:
        """Number of prompts; each may have several samples."""
        return len(self.dense.group_by_prompt(is_correct))

    @property
    def budget_tokens(self) -> int:
        """Token cap at which thinking lengths are restricted."""
        return length_budget(self.settings)


def length_budget(settings: Verification) -> int:
    """Return the cap at which lengths are restricted: the thinking budget, if there is one."""
    return settings.max_thinking_tokens or settings.max_new_tokens


@dataclass(frozen=True)
class Outcome:
    """What a check returns: a :class:`racdeploy.results.checks.CheckResult` without its name."""

    verdict: CheckVerdict
    summary: str
    figures: Mapping[str, float | str] = field(default_factory=dict)
    remedy: str = ""

    def to_result(self, name: str) -> CheckResult:
        """Return the result of the check of that name."""
        return CheckResult(name=name, **vars(self))


def run_checks(evidence: Evidence) -> list[CheckResult]:
    """Run every check that the gate enables, in the order of names.

    Raises:
        UsageError: the gate file names a check that has nothing to decide on.
    """
    results = []
    for name in plugins.list_names("checks"):
        outcome: Outcome
        if name in evidence.skip_reasons:
            outcome = Outcome("skipped", evidence.skip_reasons[name])
        elif not evidence.gate.is_enabled(name):
            outcome = Outcome("skipped", "the gate does not ask for it")
        else:
            outcome = plugins.load("checks", name).check(evidence)
        results.append(outcome.to_result(name))

    # A user who sets a limit expects a decision: a silent skip would let a bad model pass.
    for result in results:
        unmeasured = result.verdict == "inconclusive" and not result.figures
        undecided = unmeasured or result.verdict in ("measured", "skipped")
        if result.name in evidence.gate.required_checks and undecided:
            raise UsageError(
                "check-not-measured",
                f"the gate file names the check {result.name}, which has nothing to decide on: "
                f"{result.summary}",
                remedy=result.remedy or f"take [{result.name}] out of the gate file",
            )

    return results

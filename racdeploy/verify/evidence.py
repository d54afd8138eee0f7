"""What a verification has measured, and the checks that decide on it.

A check is a file of ``checks/`` with ``check(evidence) -> CheckResult`` and, if it has limits, a
class ``Limits``, its table in the gate. ``run_checks`` runs every file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from racdeploy import plugins
from racdeploy.engines.engine import Ids
from racdeploy.errors import UsageError
from racdeploy.recipe import Verification
from racdeploy.results.answers import HarnessRun, Record
from racdeploy.results.checks import CheckResult, CheckVerdict
from racdeploy.results.pruning import PositionRow, TensorRow
from racdeploy.verify.gate import Gate
from racdeploy.verify.stats import paired

T = TypeVar("T")
is_correct: Callable[[Record], bool] = attrgetter("correct")
thinking_tokens: Callable[[Record], int] = attrgetter("thinking_tokens")
FAULTS: dict[str, Callable[[Record], bool]] = {
    "unclosed": lambda record: record.state == "open",
    "loops": lambda record: record.loop_tokens > 0,
    "forced": lambda record: record.state == "forced",
    "cut": lambda record: record.state != "open" and record.finish_reason == "length",
}
"""What may go wrong with a completion."""


def completion_tokens(record: Record) -> int:
    """Return the length of thinking and answer together."""
    return record.thinking_tokens + record.answer_tokens


@dataclass(frozen=True)
class Arm:
    """One model's answers.

    Args:
        records: one per prompt and sample, in that order.
        size_bytes: of the artifact; None where nobody sees it, as behind a server.
        sparsity: zeros over the prunable weights in the file, 0 to 1.
        stats: what the engine counted: ``load_ms``, ``generated_tokens``, ``decode_s``, …
        files: SHA-256 of each file.
        kernels: what ran it, in the engine's words.
    """

    name: str
    records: tuple[Record, ...]
    size_bytes: int | None = None
    quant: str = ""
    sparsity: float | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    kernels: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens decoded per second; None where it was not measured."""
        decode_s = self.stats.get("decode_s")
        return self.stats.get("generated_tokens", 0.0) / decode_s if decode_s else None

    def count(self, holds: Callable[[Record], bool]) -> int:
        """Count the records of which something holds."""
        return sum(map(holds, self.records))

    def by_prompt(self, value: Callable[[Record], T]) -> list[list[T]]:
        """Return a value of every record, the samples of a prompt in one row."""
        rows: dict[int, list[T]] = {}
        for record in self.records:
            rows.setdefault(record.prompt, []).append(value(record))
        return list(rows.values())


@dataclass(frozen=True)
class OtherArtifact:
    """The pruned model for another engine in the same bundle; files as in :class:`Evidence`."""

    arm: Arm
    backend: str
    artifact: Path
    artifact_files: Mapping[str, str]


@dataclass(frozen=True)
class TokenProbe:
    """A text with the ids the tokenizer gives and the ids the engine gives."""

    text: str
    expected: Ids
    actual: Ids


@dataclass(frozen=True)
class PromptProbe:
    """A question, tokenized by transformers (or as the bundle recorded), bundle and artifact.

    ``artifact`` is None where it has no template; ``lead`` is the beginning-of-sequence that the
    tokenizer demands and templates may leave out.
    """

    question: str
    expected: Ids
    rendered: Ids
    artifact: Ids | None = None
    lead: Ids = ()


@dataclass(frozen=True)
class StopIds:
    """End-of-sequence ids of the checkpoint, and the one that the artifact names, or None."""

    expected: Ids
    actual: int | None


class Divergence(NamedTuple):
    """Mean KL(reference ‖ other) in nats; shares of positions with the same most likely token, and
    of those where the other's is less than half as likely to the reference as its own.
    """

    kl: float
    top1: float
    changed: float


@dataclass(frozen=True)
class LogitComparison:
    """Teacher-forced comparison on the dense model's own traces, over completion tokens.

    ``export`` is of the artifact from the pruned checkpoint under torch, ``pruning`` of that from
    the dense one, ``along`` both by distance from the end of the prompt. Where the pruned model has
    fewer tokens, only ``traces`` that use no others were compared, and ``lost_mass`` is the mean
    probability that the dense model gives to the others.
    """

    tokens: int
    export: Divergence
    pruning: Divergence
    along: tuple[PositionRow, ...] = ()
    traces: int = 0
    lost_mass: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """Everything the checks may look at; what was not measured is None, and a check says so.

    Args:
        artifact_files: recorded hash of each of its files, by the path from the main file's folder.
        sparsity_asked: of the prunable weights, in the last step that was kept.
        prunable: names of the artifact's prunable tensors.
        probes: None where the engine has no tokenizer of its own.
        token_differences: share of the probes that may differ, 0 to 1.
        rivals: dense models in other quants; no check looks at them.
        stop_ids: None where the artifact holds no tokenizer.
        unseen: why there is nothing to look at, by the name of the check.
        harness: what an evaluation harness found; None where none was run.
    """

    settings: Verification
    gate: Gate
    dense: Arm
    pruned: Arm
    artifact: Path = Path()
    artifact_files: Mapping[str, str] = field(default_factory=dict)
    sparsity_asked: float = 0.0
    tensors: tuple[TensorRow, ...] = ()
    prunable: frozenset[str] = frozenset()
    dense_linears: frozenset[str] = frozenset()
    probes: tuple[TokenProbe, ...] | None = ()
    token_differences: float = 0.0
    logits: LogitComparison | None = None
    backend: str = ""
    also: tuple[OtherArtifact, ...] = ()
    rivals: tuple[Arm, ...] = ()
    prompts: tuple[PromptProbe, ...] = ()
    stop_ids: StopIds | None = None
    packing: str = "plain"
    unseen: Mapping[str, str] = field(default_factory=dict)
    harness: HarnessRun | None = None

    @property
    def prompt_count(self) -> int:
        return len(self.dense.by_prompt(is_correct))

    @property
    def budget_tokens(self) -> int:
        return length_budget(self.settings)

    def disagreements(self, holds: Callable[[Record], bool]) -> paired.Pairs:
        """Count the prompts for which something holds of one arm only; ``n10`` is dense only."""
        return paired.paired_counts(self.dense.by_prompt(holds), self.pruned.by_prompt(holds))


def length_budget(settings: Verification) -> int:
    """Return the cap at which lengths are restricted: that of the thinking, where it has one."""
    return settings.max_thinking_tokens or settings.max_new_tokens


def make_result(
    name: str,
    verdict: CheckVerdict,
    summary: str,
    figures: Mapping[str, float | str] | None = None,
    remedy: str = "",
) -> CheckResult:
    """Return what a check found."""
    found = dict(figures or {})
    return CheckResult(name=name, verdict=verdict, summary=summary, figures=found, remedy=remedy)


def run_checks(evidence: Evidence) -> list[CheckResult]:
    """Run the checks that the gate asks for, by name; UsageError where one was not measured."""
    results = []
    for name in plugins.names("checks"):
        result: CheckResult
        if name in evidence.unseen:
            result = make_result(name, "skipped", evidence.unseen[name])
        elif not evidence.gate.runs(name):
            result = make_result(name, "skipped", "the gate does not ask for it")
        else:
            result = plugins.load("checks", name).check(evidence)
        results.append(result)

    for result in results:
        unmeasured = result.verdict == "inconclusive" and not result.figures
        undecided = unmeasured or result.verdict in ("measured", "skipped")
        if result.name in evidence.gate.demanded and undecided:
            raise UsageError(
                "check-not-measured",
                f"the gate file names the check {result.name}, which has nothing to decide on: "
                f"{result.summary}",
                remedy=result.remedy or f"take [{result.name}] out of the gate file",
            )

    return results

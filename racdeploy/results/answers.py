"""Data models of answers: records of prompts, summaries of models, and comparisons."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from racdeploy.files.reading import Json
from racdeploy.results.checks import VerdictName
from racdeploy.results.schema import Difference, FrozenModel, OpenShare, PositiveCount, Ratio, Share

ThinkingState = Literal["closed", "forced", "open", "absent", "reopened"]
ThinkingOpening = Literal["prefilled", "emitted", "implied", "none"]
HESITATION_WORDS = (
    "Wait",
    "Alternatively",
    "Hmm",
    "But",
    "However",
    "Maybe",
    "Perhaps",
    "Actually",
)
"""Words with which a sentence of a thought hesitates."""


class ArmSummary(FrozenModel):
    """Summary of one arm, a model that answered the prompts: ``dense``, ``pruned`` or a rival.

    Args:
        name: ``dense`` and ``pruned`` are the two arms that the verdict compares.
        prompts: prompts answered, the denominator of ``accuracy``.
        accuracy_lower, accuracy_upper: 95 % Wilson interval.
        unclosed: completions that ended inside the thinking; they count as wrong.
        forced: completions whose thinking was closed by the budget.
        truncated: completions that reached the token limit after the thinking.
        loops: completions that began to repeat themselves.
        size_bytes: of the files that every engine opens; without the graph of ``bitmask_op``.
        sparsity: zeros in the exported file, over the prunable weights.
        files: SHA-256 of each file of the artifact.
        kernels: kernels that ran, in the engine's words.
    """

    name: str
    prompts: PositiveCount
    correct: NonNegativeInt
    accuracy: Share
    accuracy_lower: Share
    accuracy_upper: Share
    thinking_tokens_mean: NonNegativeFloat | None = None
    answer_tokens_mean: NonNegativeFloat | None = None
    unclosed: NonNegativeInt = 0
    forced: NonNegativeInt = 0
    truncated: NonNegativeInt = 0
    loops: NonNegativeInt = 0
    size_bytes: NonNegativeInt | None = None
    tokens_per_s: NonNegativeFloat | None = None
    load_ms: NonNegativeFloat | None = None
    peak_rss_bytes: NonNegativeInt | None = None
    quant: str | None = None
    sparsity: Share | None = None
    files: dict[str, str] = Field(default_factory=dict)
    kernels: str | None = None

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.correct > self.prompts:
            raise ValueError(f"{self.correct} correct of {self.prompts} prompts")
        return self

    @property
    def seconds_per_right(self) -> float | None:
        """Seconds of decoding for each correct answer; None without a speed or a correct answer."""
        if not (self.tokens_per_s and self.accuracy) or self.answer_tokens_mean is None:
            return None
        tokens = (self.thinking_tokens_mean or 0) + self.answer_tokens_mean
        return tokens / self.tokens_per_s / self.accuracy


class TaskRow(FrozenModel):
    """Correct answers of both arms on one task.

    Args:
        protocol: harness and version whose prompt and score the task has; empty for our own.
    """

    task: str
    protocol: str = ""
    prompts: NonNegativeInt
    dense_correct: NonNegativeInt
    pruned_correct: NonNegativeInt


class Comparison(FrozenModel):
    """Comparison of the pruned arm with the dense one over the same prompts.

    Args:
        drop: accuracy lost by pruning, as a fraction; negative if pruned is better.
        margin: largest drop that passes; ``verdict`` is non-inferiority within it.
        n10, n01: answers, over all samples, that only dense or only pruned gets right.
        n: prompts answered by both arms.
        length_ratio: restricted mean thinking length, pruned to dense; None if not measured.
        length_limit: largest ratio that passes.
        length_budget_tokens: cap at which lengths are restricted, equal for both arms.
        confidence: level of both two-sided intervals; 0.90 makes each gate a one-sided 5 % test.
        planned: prompts that might have been asked, if they were asked until the verdict was clear;
            the level is then that of the last analysis. None if all are judged at once.
    """

    drop: Difference
    drop_lower: Difference
    drop_upper: Difference
    verdict: VerdictName
    margin: float
    n10: NonNegativeInt
    n01: NonNegativeInt
    n: PositiveCount
    length_ratio: Ratio | None = None
    length_lower: Ratio | None = None
    length_upper: Ratio | None = None
    length_limit: PositiveFloat | None = None
    length_budget_tokens: PositiveCount | None = None
    confidence: OpenShare = 0.90
    planned: PositiveCount | None = None


class RivalRow(FrozenModel):
    """Comparison of a dense model with the pruned one over the same prompts.

    Args:
        gain: accuracy of the rival minus that of the pruned model, as a fraction.
        length_ratio: restricted mean thinking length, rival to pruned.
    """

    name: str
    gain: Difference
    gain_lower: Difference
    gain_upper: Difference
    length_ratio: Ratio
    length_lower: Ratio
    length_upper: Ratio


class HarnessRow(FrozenModel):
    """One metric of one task of an evaluation harness, for both models, in the harness's own unit.

    Args:
        documents: number of documents that each model was asked.
        difference: pruned minus dense.
        dense_stderr, pruned_stderr: the harness's own standard errors.
        lower, upper: interval of the difference over the same documents; None if not paired.
        lost, won: documents that only dense or only pruned gets right; None for metrics that are
            not right or wrong.
        unpaired_reason: reason why documents could not be paired; empty if they were.
    """

    task: str
    metric: str
    documents: NonNegativeInt
    dense: float
    pruned: float
    difference: float
    dense_stderr: float | None = None
    pruned_stderr: float | None = None
    larger_is_better: bool = True
    lower: float | None = None
    upper: float | None = None
    lost: NonNegativeInt | None = None
    won: NonNegativeInt | None = None
    unpaired_reason: str = ""


class HarnessRun(FrozenModel):
    """Results of an evaluation harness, which asked both models through a server.

    Args:
        name, version: of the harness.
        settings: tasks, limit, tokens, parallel requests.
        confidence: level of the rows' two-sided intervals.
    """

    name: str
    version: str
    settings: Json = Field(default_factory=dict)
    confidence: OpenShare = 0.90
    rows: tuple[HarnessRow, ...] = ()


class AnswerRecord(FrozenModel):
    """One line of ``records.jsonl``: the answer of one arm to one prompt, in one sample.

    Args:
        prompt: index of the prompt; both arms share it.
        prompt_ids: rendered prompt; empty in records of older versions.
        opening: ``prefilled`` if the first thought begins in the prompt, ``emitted`` if in the
            completion, ``implied`` if before it, ``none`` without a thought.
        loop_tokens: length of the longest repeated passage; 0 without one.
        scorer: see :mod:`racdeploy.tasks.scoring`; empty is its default.
        extracted: answer that was scored; None if none was found.
        extractor: place where it was found, or the reason why none was.
    """

    schema_version: Literal[1] = 1
    prompt: NonNegativeInt
    task: str
    question: str
    gold: str
    arm: str
    sample: NonNegativeInt = 0
    thinking_tokens: NonNegativeInt
    answer_tokens: NonNegativeInt
    state: ThinkingState
    opening: ThinkingOpening = "none"
    loop_tokens: NonNegativeInt = 0
    finish_reason: Literal["stop", "length", "cancelled"]
    correct: bool
    extracted: str | None
    extractor: str = ""
    scorer: str = ""
    answer_text: str
    thinking_text: str
    prompt_ids: tuple[int, ...] = ()

"""What models answered, as data: each prompt, each model, and how two compare."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from racdeploy.results.checks import Verdict
from racdeploy.results.part import Difference, InnerShare, Part, Positive, Ratio, Share

ThinkingState = Literal["closed", "forced", "open", "absent", "reopened"]
ThinkingOpening = Literal["prefilled", "emitted", "implied", "none"]


class ArmSummary(Part):
    """One model that answered the prompts: ``dense``, ``pruned`` or a rival.

    Args:
        name: ``dense`` and ``pruned`` are the two that are compared.
        prompts: prompts answered, the denominator of ``accuracy``.
        accuracy_lower, accuracy_upper: the 95 % Wilson interval.
        unclosed: completions that ended inside the thinking; they count as wrong.
        forced: completions whose thinking was closed by the budget.
        cut: completions that hit the token cap after the thinking.
        loops: completions that began to repeat themselves.
        size_bytes: of the files that every engine opens; without the graph of ``bitmask_op``.
        sparsity: zeros in the exported file, over the prunable weights.
        files: SHA-256 of each file of the artifact.
        kernels: what ran it, in the engine's words.
    """

    name: str
    prompts: Positive
    correct: NonNegativeInt
    accuracy: Share
    accuracy_lower: Share
    accuracy_upper: Share
    thinking_tokens_mean: NonNegativeFloat | None = None
    answer_tokens_mean: NonNegativeFloat | None = None
    unclosed: NonNegativeInt = 0
    forced: NonNegativeInt = 0
    cut: NonNegativeInt = 0
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


class TaskRow(Part):
    """Correct answers of both arms on one task, and the harness whose prompt and score it has."""

    task: str
    follows: str = ""
    prompts: NonNegativeInt
    dense_correct: NonNegativeInt
    pruned_correct: NonNegativeInt


class Comparison(Part):
    """The pruned arm against the dense one over the same prompts.

    Args:
        drop: accuracy lost by pruning, as a fraction; negative where pruning won.
        margin: largest drop that passes; ``verdict`` is non-inferiority within it.
        n10, n01: answers, over all samples, that only dense and that only pruned gets right.
        n: prompts answered by both arms.
        length_ratio: restricted mean thinking length, pruned over dense; None if not measured.
        length_limit: largest ratio that passes.
        length_budget_tokens: the cap at which lengths are restricted, equal for both arms.
        confidence: level of both two-sided intervals; 0.90 makes each gate a one-sided 5 % test.
    """

    drop: Difference
    drop_lower: Difference
    drop_upper: Difference
    verdict: Verdict
    margin: float
    n10: NonNegativeInt
    n01: NonNegativeInt
    n: Positive
    length_ratio: Ratio | None = None
    length_lower: Ratio | None = None
    length_upper: Ratio | None = None
    length_verdict: Verdict | None = None
    length_limit: PositiveFloat | None = None
    length_budget_tokens: Positive | None = None
    confidence: InnerShare = 0.90


class RivalRow(Part):
    """A dense model against the pruned one, over the same prompts.

    Args:
        gain: accuracy of the rival less that of the pruned model, as a fraction.
        length_ratio: restricted mean thinking length, rival over pruned.
    """

    name: str
    gain: Difference
    gain_lower: Difference
    gain_upper: Difference
    length_ratio: Ratio
    length_lower: Ratio
    length_upper: Ratio


class HarnessRow(Part):
    """One metric of one task of an evaluation harness, of both models, in the harness's own unit.

    Args:
        documents: asked, of each model.
        difference: pruned less dense.
        dense_stderr, pruned_stderr: the harness's own standard errors.
        lower, upper: interval of the difference over the same documents; None where not paired.
        lost, won: documents that only dense and that only pruned gets right; None for figures that
            are not right or wrong.
        unpaired: why documents could not be compared one by one; empty where they were.
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
    unpaired: str = ""


class HarnessRun(Part):
    """What an evaluation harness found, asking both models through a server.

    Args:
        name, version: of the harness.
        settings: what was asked and how: tasks, limit, tokens, requests at a time.
        confidence: level of the rows' two-sided intervals.
    """

    name: str
    version: str
    settings: dict[str, Any] = Field(default_factory=dict)
    confidence: InnerShare = 0.90
    rows: tuple[HarnessRow, ...] = ()


class Record(Part):
    """One line of ``records.jsonl``: one prompt, arm and sample.

    Args:
        prompt: index of the prompt; both arms share it.
        prompt_ids: the rendered prompt; empty in records of older versions.
        opening: the first thought began in the prompt, the completion, before it, or nowhere.
        loop_tokens: length of the longest stretch that repeats itself, 0 where there is none.
        scorer: what decided, see :mod:`racdeploy.tasks.scoring`; empty is its default.
        extracted: the answer that was scored, None if none was found.
        extractor: where it was found, or why nothing was.
    """

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

"""The report and the records: what a verification found, as data.

The verdict is never stored on its own: it follows from the checks in :func:`overall_verdict`, and a
file with another verdict is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    WithJsonSchema,
    computed_field,
    model_validator,
)

Verdict = Literal["pass", "fail", "inconclusive"]
CheckVerdict = Literal["pass", "fail", "inconclusive", "measured", "skipped"]
ThinkingState = Literal["closed", "forced", "open", "absent", "reopened"]
ThinkingOpening = Literal["prefilled", "emitted", "implied", "none"]
# A ratio of means, infinite where the denominator is zero.
Ratio = Annotated[
    float,
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": "Infinity"}]}),
]


class _Part(BaseModel):
    # An unbounded interval has infinite ends; "strings" keeps the file valid JSON.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ArmSummary(_Part):
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
    prompts: int = Field(ge=1)
    correct: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    accuracy_lower: float = Field(ge=0, le=1)
    accuracy_upper: float = Field(ge=0, le=1)
    thinking_tokens_mean: float | None = Field(None, ge=0)
    answer_tokens_mean: float | None = Field(None, ge=0)
    unclosed: int = Field(0, ge=0)
    forced: int = Field(0, ge=0)
    cut: int = Field(0, ge=0)
    loops: int = Field(0, ge=0)
    size_bytes: int | None = Field(None, ge=0)
    tokens_per_s: float | None = Field(None, ge=0)
    load_ms: float | None = Field(None, ge=0)
    peak_rss_bytes: int | None = Field(None, ge=0)
    quant: str | None = None
    sparsity: float | None = Field(None, ge=0, le=1)
    files: dict[str, str] = Field(default_factory=dict)
    kernels: str | None = None

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.correct > self.prompts:
            raise ValueError(f"{self.correct} correct of {self.prompts} prompts")
        return self


class TaskRow(_Part):
    """Correct answers of both arms on one task, and the harness whose prompt and score it has."""

    task: str
    follows: str = ""
    prompts: int = Field(ge=0)
    dense_correct: int = Field(ge=0)
    pruned_correct: int = Field(ge=0)


class Comparison(_Part):
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

    drop: float = Field(ge=-1, le=1)
    drop_lower: float = Field(ge=-1, le=1)
    drop_upper: float = Field(ge=-1, le=1)
    verdict: Verdict
    margin: float
    n10: int = Field(ge=0)
    n01: int = Field(ge=0)
    n: int = Field(ge=1)
    length_ratio: Ratio | None = None
    length_lower: Ratio | None = None
    length_upper: Ratio | None = None
    length_verdict: Verdict | None = None
    length_limit: float | None = Field(None, gt=0)
    length_budget_tokens: int | None = Field(None, ge=1)
    confidence: float = Field(0.90, gt=0, lt=1)


class CheckResult(_Part):
    """What one check of the gate found.

    Args:
        name: the check's plugin name.
        verdict: ``measured`` has figures and no limit, ``skipped`` has none; neither decides.
        summary: one sentence with the numbers that decided; ``figures`` has units in the names.
        remedy: the next thing to do where it did not pass.
    """

    name: str
    verdict: CheckVerdict
    summary: str
    figures: dict[str, float | int | str] = Field(default_factory=dict)
    remedy: str = ""


class LinearRow(_Part):
    """How one linear was pruned.

    Args:
        held_out_error: relative error of the output, over traces that were not used to prune.
        error_by_stream: the same for ``prompt``, ``thinking`` and ``answer`` tokens.
        damping: share of the mean diagonal that was added to the Hessian.
        reason: why the zeros are not as asked; empty where they are.
        tokens: of the calibration that the router sent to the linear's expert; None where all see
            it.
        pooled: whether these were too few, so that the tokens of all experts of the block decided.
    """

    name: str
    sparsity_asked: float = Field(ge=0, le=1)
    sparsity_reached: float = Field(ge=0, le=1)
    held_out_error: float | None = None
    error_by_stream: dict[str, float] = Field(default_factory=dict)
    damping: float | None = None
    reason: str = ""
    tokens: int | None = Field(None, ge=0)
    pooled: bool = False


class BlockRow(_Part):
    """How far the hidden states after one block are from the dense model's, on held-out traces.

    Args:
        drift: relative error, Σ |sparse − dense|² / Σ |dense|²; by stream: ``prompt``,
            ``thinking`` and ``answer`` tokens.
    """

    block: int = Field(ge=0)
    drift: float | None = None
    drift_by_stream: dict[str, float] = Field(default_factory=dict)
    drift_by_task: dict[str, float] = Field(default_factory=dict)


class StructureRow(_Part):
    """How wide one block of the pruned model is, beside the dense block that it was cut from.

    Args:
        block: its number in the pruned model.
        source_block: its number in the dense model.
        heads: query heads; ``channels`` are those of the feed-forward part.
        experts: 0 where the block has none.
    """

    block: int = Field(ge=0)
    source_block: int = Field(ge=0)
    heads: int = Field(ge=1)
    key_value_heads: int = Field(ge=1)
    channels: int = Field(ge=1)
    heads_dense: int = Field(ge=1)
    channels_dense: int = Field(ge=1)
    experts: int = Field(0, ge=0)
    experts_dense: int = Field(0, ge=0)


class Kept(_Part):
    """What is left of the whole model where something of its structure was cut.

    Args:
        key_value_heads: of each block, as in every other.
        vocabulary: tokens, with those that only fill it up.
    """

    parameters: int = Field(ge=1)
    parameters_dense: int = Field(ge=1)
    blocks: int = Field(ge=1)
    blocks_dense: int = Field(ge=1)
    key_value_heads: int = Field(ge=1)
    key_value_heads_dense: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    vocabulary_dense: int = Field(ge=1)


class RecoveryRow(_Part):
    """One look at the pruned model while it learned from the dense one.

    Args:
        phase: ``start``, the name of a way (``all``, ``blocks``, ``scales``), or ``own answers N``.
        tokens: of traces learned since the start, over all phases.
        loss: mean over what was learned since the look before, in the way's own unit; None at the
            start.
        kl_nats: mean KL(dense ‖ sparse) over held-out traces; None where it was not measured.
        text_kl_nats: the same over the user's own text, held-out parts; None where there was none.
        accuracy: share of the calibration prompts that it answers right; None where it was not
            asked.
        kept: whether the phase entered the model; one that made it worse was undone.
    """

    phase: str
    tokens: int = Field(ge=0)
    loss: float | None = None
    kl_nats: float | None = None
    text_kl_nats: float | None = None
    accuracy: float | None = Field(None, ge=0, le=1)
    kept: bool = True


class PositionRow(_Part):
    """Mean divergence over a stretch of the dense model's completions, teacher-forced.

    Args:
        start_token, stop_token: the half-open stretch, counted from the end of the prompt.
        tokens: positions of all traces in it.
        export_kl_nats: mean KL(torch-pruned ‖ artifact).
        pruning_kl_nats: mean KL(torch-dense ‖ torch-pruned).
    """

    start_token: int = Field(ge=0)
    stop_token: int = Field(ge=1)
    tokens: int = Field(ge=1)
    export_kl_nats: float
    pruning_kl_nats: float


class RivalRow(_Part):
    """A dense model against the pruned one, over the same prompts.

    Args:
        gain: accuracy of the rival less that of the pruned model, as a fraction.
        length_ratio: restricted mean thinking length, rival over pruned.
    """

    name: str
    gain: float = Field(ge=-1, le=1)
    gain_lower: float = Field(ge=-1, le=1)
    gain_upper: float = Field(ge=-1, le=1)
    length_ratio: Ratio
    length_lower: Ratio
    length_upper: Ratio


class HarnessRow(_Part):
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
    documents: int = Field(ge=0)
    dense: float
    pruned: float
    difference: float
    dense_stderr: float | None = None
    pruned_stderr: float | None = None
    larger_is_better: bool = True
    lower: float | None = None
    upper: float | None = None
    lost: int | None = Field(None, ge=0)
    won: int | None = Field(None, ge=0)
    unpaired: str = ""


class HarnessRun(_Part):
    """What an evaluation harness found, asking both models through a server.

    Args:
        name, version: of the harness.
        settings: what was asked and how: tasks, limit, tokens, requests at a time.
        confidence: level of the rows' two-sided intervals.
    """

    name: str
    version: str
    settings: dict[str, Any] = Field(default_factory=dict)
    confidence: float = Field(0.90, gt=0, lt=1)
    rows: tuple[HarnessRow, ...] = ()


class DeviationRow(_Part):
    """Something of a whole file that is not as asked, beside linears and tensors.

    Args:
        what: as ``architecture``.
        asked, real: what was expected, and what it became.
        reason: why they differ.
    """

    what: str
    asked: str
    real: str
    reason: str


VECTORS_IN_F32 = "vectors are stored in f32"
"""Why norms and biases have no number format of the linears, in every file of every format."""


class TensorRow(_Part):
    """How one tensor was exported.

    Args:
        zeros: exact zeros in the exported tensor, as a fraction of its weights.
        size_bytes: as stored.
        bits: of a weight, as stored; None in reports that were written before it was kept.
        reason, packing_reason: why it is not as asked; empty where it is.
    """

    name: str
    quant_asked: str
    quant_real: str
    zeros: float = Field(ge=0, le=1)
    size_bytes: int = Field(ge=0)
    bits: float | None = Field(None, ge=0)
    reason: str = ""
    packing: str = "plain"
    packing_reason: str = ""


class Record(_Part):
    """One line of ``records.jsonl``: one prompt, arm and sample.

    Args:
        prompt: index of the prompt; both arms share it.
        prompt_ids: the rendered prompt; empty in records of older versions.
        opening: the first thought began in the prompt, the completion, before it, or nowhere.
        loop_tokens: length of the longest stretch that repeats itself, 0 where there is none.
        scorer: what decided, see :mod:`racdeploy.scorers`; empty is its default.
        extracted: the answer that was scored, None if none was found.
        extractor: where it was found, or why nothing was.
    """

    prompt: int = Field(ge=0)
    task: str
    question: str
    gold: str
    arm: str
    sample: int = Field(0, ge=0)
    thinking_tokens: int = Field(ge=0)
    answer_tokens: int = Field(ge=0)
    state: ThinkingState
    opening: ThinkingOpening = "none"
    loop_tokens: int = Field(0, ge=0)
    finish_reason: Literal["stop", "length", "cancelled"]
    correct: bool
    extracted: str | None
    extractor: str = ""
    scorer: str = ""
    answer_text: str
    thinking_text: str
    prompt_ids: tuple[int, ...] = ()


class Report(_Part):
    """Everything ``report.json`` holds.

    Args:
        created: when the verification ended, with time zone.
        recipe: the resolved recipe.
        structure: one row for each block of the pruned model; empty where blocks are as they were.
        kept: what is left of the whole model; None where nothing was cut.
        recovery: looks at the pruned model while it learned from the dense one, in order; empty
            where it did not.
        harness: what an evaluation harness found; None where none was run.
        notes: whatever a reader must know and no table says.
        fingerprint: versions, threads and engine settings that the numbers depend on.
    """

    schema_version: Literal[1] = 1
    created: AwareDatetime
    model: str
    target: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    arms: tuple[ArmSummary, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    comparison: Comparison | None = None
    rivals: tuple[RivalRow, ...] = ()
    checks: tuple[CheckResult, ...] = ()
    linears: tuple[LinearRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    structure: tuple[StructureRow, ...] = ()
    kept: Kept | None = None
    recovery: tuple[RecoveryRow, ...] = ()
    positions: tuple[PositionRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    deviations: tuple[DeviationRow, ...] = ()
    harness: HarnessRun | None = None
    notes: tuple[str, ...] = ()
    fingerprint: dict[str, Any] = Field(default_factory=dict)

    def arm(self, name: str) -> ArmSummary | None:
        """Return the model of that name."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def check(self, name: str) -> CheckResult | None:
        """Return what the check of that name found."""
        return next((check for check in self.checks if check.name == name), None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """The one verdict that is printed and that decides the exit code."""
        return overall_verdict(self.checks)

    @model_validator(mode="wrap")
    @classmethod
    def _check_verdict(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping) or "verdict" not in data:
            return handler(data)

        report = handler({key: value for key, value in data.items() if key != "verdict"})
        if data["verdict"] != report.verdict:
            raise ValueError(
                f"the verdict is {data['verdict']!r} and the checks say {report.verdict!r}"
            )

        return report


def overall_verdict(checks: Iterable[CheckResult]) -> Verdict:
    """Return the verdict of a whole report.

    One failed check fails it. Otherwise one inconclusive check makes it inconclusive, and so do no
    checks at all or only ones that decide nothing: missing data never passes.
    """
    verdicts = {check.verdict for check in checks}
    if "fail" in verdicts:
        return "fail"
    if "inconclusive" in verdicts or "pass" not in verdicts:
        return "inconclusive"
    return "pass"

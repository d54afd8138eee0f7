"""Thinking: the pruned model must not think longer, loop, or fail to stop."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from racdeploy.report.model import CheckResult, Record, Verdict
from racdeploy.verify import gate, stats
from racdeploy.verify.evidence import Evidence

FAULTS: dict[str, Callable[[Record], bool]] = {
    "unclosed": lambda record: record.state == "open",
    "loops": lambda record: record.loop_tokens > 0,
    "forced": lambda record: record.state == "forced",
    "cut": lambda record: record.state != "open" and record.finish_reason == "length",
}


class Limits(gate.Limits):
    """Thinking; each share is judged like the accuracy drop, with its whole interval.

    Args:
        length_ratio: largest ratio of restricted mean thinking lengths, pruned to dense, that passes.
        unclosed: largest share of prompts that may lose the end of their thinking.
        loops: largest share of prompts that may begin to repeat themselves.
        forced: largest share of prompts whose thinking may newly need the budget to end it.
        cut: largest share of prompts whose answer may newly fail to end.
    """

    length_ratio: float = Field(1.2, gt=0)
    unclosed: float = Field(0.05, gt=0, lt=1)
    loops: float = Field(0.05, gt=0, lt=1)
    forced: float = Field(0.05, gt=0, lt=1)
    cut: float = Field(0.05, gt=0, lt=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if the interval of the length ratio is below its limit, and that of each fault below its own.

    Where the dense model does not think, the whole completion counts.
    """
    limits, confidence = evidence.limits(Limits), evidence.gate.confidence
    thinks = any(record.thinking_tokens for record in evidence.dense.records)
    dense, pruned = (
        arm.by_prompt(_thinking if thinks else _completion)
        for arm in (evidence.dense, evidence.pruned)
    )
    budget = evidence.settings.max_thinking_tokens or evidence.settings.max_new_tokens
    ratio = stats.length_ratio(dense, pruned, budget, confidence)
    verdicts = {"length": stats.judge(ratio, limits.length_ratio)}
    counts: list[str] = []
    figures: dict[str, float | int | str] = {}
    for fault, holds in FAULTS.items():
        fewer, more, prompts = evidence.disagreements(holds)
        verdicts[fault] = stats.non_inferiority(
            more, fewer, prompts, getattr(limits, fault), confidence
        )
        before, after = (sum(map(holds, arm.records)) for arm in (evidence.dense, evidence.pruned))
        figures |= {
            f"{fault}_dense": before,
            f"{fault}_pruned": after,
            f"{fault}_limit": getattr(limits, fault),
        }
        counts.append(f"{fault} {before} → {after}")
    verdict: Verdict = next((v for v in ("fail", "inconclusive") if v in verdicts.values()), "pass")
    because = ", ".join(name for name, found in verdicts.items() if found == verdict)
    return CheckResult(
        name="thinking",
        verdict=verdict,
        summary=(
            ("" if verdict == "pass" else f"{because}: ")
            + f"{'thinking' if thinks else 'completion'} length ratio {ratio.ratio:.3f}, {confidence:.0%} "
            f"interval {ratio.lower:.3f} to {ratio.upper:.3f}, limit {limits.length_ratio:g}; "
            f"{', '.join(counts)} of {len(evidence.dense.records)}"
        ),
        figures={
            "length_ratio": ratio.ratio,
            "length_lower": ratio.lower,
            "length_upper": ratio.upper,
            "length_limit": limits.length_ratio,
            "budget_tokens": budget,
            **figures,
        },
        remedy={
            "pass": "",
            "fail": "calibrate with source = 'rac', on longer traces, or lower the sparsity",
            "inconclusive": "verify on more prompts: verify.count in the recipe, or a larger --tier",
        }[verdict],
    )


def _thinking(record: Record) -> int:
    return record.thinking_tokens


def _completion(record: Record) -> int:
    return record.thinking_tokens + record.answer_tokens

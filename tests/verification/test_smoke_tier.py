"""The smoke tier: limits that its few prompts can show, and what a report says of them."""

from __future__ import annotations

from typing import Any

import pytest

from racdeploy.api.builds import open_job
from racdeploy.api.options import BuildOptions
from racdeploy.errors import exit_code_of
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.report import html, markdown
from racdeploy.report.summary import write_findings, write_headline
from racdeploy.results.report import Report
from racdeploy.verification.checks import accuracy, backends, thinking
from racdeploy.verification.gate import Gate, read_gate
from racdeploy.verification.report_builder import build_report
from tests.support.evidence import make_evidence
from tests.support.records import arm_of, record

JUDGED = {"checks": ["accuracy", "thinking"]}


def _judge(right: int, prompts: int, gate: Gate) -> Report:
    """Return the report on a model that answers some prompts right, the dense one all."""
    dense = arm_of([record(prompt) for prompt in range(prompts)])
    answers = [record(prompt, correct=prompt < right, arm="pruned") for prompt in range(prompts)]
    evidence = make_evidence(
        dense, arm_of(answers), gate=gate, settings=Recipe().verify, requested_sparsity=0.0
    )

    report, _ = build_report(
        evidence,
        [],
        model="tiny",
        target="gguf",
        recipe=Recipe().model_dump(mode="json"),
        linears=[],
        blocks=[],
        structure=[],
        kept_structure=None,
        recovery=[],
        deviations=[],
        fingerprint={},
    )
    return report


@pytest.mark.parametrize(
    ("right", "verdict", "code"),
    [
        (32, "pass", 0),
        (31, "pass", 0),
        (28, "inconclusive", 3),
        (16, "fail", 1),
    ],
)
def test_a_visibly_worse_model_does_not_look_like_a_healthy_one(
    right: int, verdict: str, code: int
) -> None:
    """Of 32 prompts: word and exit code tell a healthy, a worse and a broken model apart."""
    gate = read_gate(built=JUDGED).for_tier("smoke")
    report = _judge(right, 32, gate)
    assert (report.verdict, exit_code_of(report.verdict, gate.inconclusive)) == (verdict, code)


def test_a_report_of_few_prompts_says_what_they_can_show() -> None:
    """A pass is worded as what it is, beside the margin that was meant; others name both too."""
    smoke = read_gate(built=JUDGED).for_tier("smoke")
    widened = "32 prompts can show: the margin was widened to 18.9 points from 5.0."
    assert f"No breakage was found, which is all that {widened}" in write_findings(
        _judge(32, 32, smoke)
    )
    assert f"Breakage is what {widened}" in write_findings(_judge(28, 32, smoke))
    assert "breakage" not in write_findings(
        _judge(200, 200, read_gate(built=JUDGED).for_tier("standard"))
    )


def test_a_widened_pass_never_looks_like_the_gate_that_was_asked() -> None:
    """In the headline, the comment's sign and the page's badge."""
    smoke = _judge(32, 32, read_gate(built=JUDGED).for_tier("smoke"))
    asked = _judge(200, 200, read_gate(built=JUDGED).for_tier("standard"))
    failed = _judge(16, 32, read_gate(built=JUDGED).for_tier("smoke"))

    assert write_headline(smoke).startswith("PASS with a widened margin: ")
    assert markdown.render(smoke).startswith("### ☑️ PASS with")
    page = html.render(smoke, [])
    assert '<span class="badge">pass, margin widened</span>' in page
    assert '<header class="pass">' not in page

    assert write_headline(asked).startswith("PASS: ")
    assert markdown.render(asked).startswith("### ✅ PASS: ")
    assert '<span class="badge">pass</span>' in html.render(asked, [])
    assert write_headline(failed).startswith("FAIL: ")


@pytest.mark.parametrize(("right", "prompts", "advised"), [(190, 200, 400), (50, 50, 150)])
def test_too_few_prompts_are_answered_with_a_number(right: int, prompts: int, advised: int) -> None:
    """Twice as many, or what is enough for a model that disagrees as often as this one."""
    report = _judge(right, prompts, read_gate(built=JUDGED))
    assert report.verdict == "inconclusive"
    found = report.find_check("accuracy")
    assert found
    assert f"--prompts {advised}" in found.remedy


def test_limits_are_widened_to_what_the_prompts_show_and_no_further() -> None:
    """All limits on a share of the prompts; one that is wider already stays, as do ratios."""
    gate = read_gate(built={"thinking": {"loops": 0.4}})
    smoke = gate.for_tier("smoke")
    found = smoke.limits(thinking.Limits)
    assert smoke.limits(accuracy.Limits).margin == 0.189
    assert smoke.limits(backends.Limits).margin == 0.189
    assert (found.unclosed, found.forced, found.truncated) == (0.189, 0.189, 0.189)
    assert (found.loops, found.length_ratio) == (0.4, 1.2)
    assert smoke.original.limits(accuracy.Limits).margin == 0.05

    assert gate.for_tier("smoke", 12).limits(accuracy.Limits).margin > 0.25
    assert gate.for_tier("smoke", 2).limits(accuracy.Limits).margin == 0.5
    assert gate.for_tier("smoke", 1000).limits(accuracy.Limits).margin == 0.05
    assert gate.for_tier("release").limits(accuracy.Limits).margin == 0.05


def test_a_gate_may_keep_its_limits_for_few_prompts() -> None:
    """``widen = false`` judges by the margin that is written, whatever so few prompts show."""
    gate = read_gate(built=JUDGED | {"tiers": {"smoke": {"widen": False}}}).for_tier("smoke")
    assert gate.tiers.smoke.prompts == 32
    assert _judge(32, 32, gate).verdict == "inconclusive"


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": 24},
        {"settings": {"verify.count": 24}},
    ],
    ids=["--prompts", "--set"],
)
def test_prompts_that_a_user_types_win_over_the_tiers(options: dict[str, Any]) -> None:
    """So many are asked, and limits are those that so many can show."""
    job = open_job(BuildOptions(tasks=("gcd",), **options), "smoke")
    assert len(job.problems("evaluation")) == 24
    margin = job.gate.limits(accuracy.Limits).margin
    assert margin == read_gate().for_tier("smoke", 24).limits(accuracy.Limits).margin > 0.189


def test_a_recipes_prompts_do_not_win_over_a_tier() -> None:
    """Who types a tier wants its size, whatever the file says."""
    job = Job.at_tier(Recipe(tasks=("gcd",)), "smoke")
    assert len(job.problems("evaluation")) == 32

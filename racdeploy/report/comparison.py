"""One table of several models that were compared with the same reference."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.report.markdown import escape, write_table
from racdeploy.report.tables import ReportTable, fill_cells, to_single_line
from racdeploy.results.answers import ArmSummary
from racdeploy.results.report import Report
from racdeploy.results.units import format_confidence

_COLUMNS = {
    "size": "{0.size_bytes:bytes}",
    "right": "{0.correct:,} of {0.prompts:,}",
    "points lost": "{1.drop:points} ({1.drop_lower:points} to {1.drop_upper:points})",
    "thinking tokens": "{0.thinking_tokens_mean:,.1f}",
    "length ratio": "{1.length_ratio:ratio} ({1.length_lower:ratio} to {1.length_upper:ratio})",
    "tokens/s": "{0.tokens_per_s:,.0f}",
    "s per right answer": "{0.seconds_per_right:.3g}",
}


def make_comparison_table(reports: Sequence[Report]) -> ReportTable:
    """Return a row for the reference and one for each candidate, in the given order."""
    rows = [_fill(reports[0].reference, "reference", reports[0].dense_arm, None)]
    for report in reports:
        arm = report.find_arm("pruned")
        assert arm
        rows.append(_fill(report.model, report.verdict, arm, report))
    return ReportTable("Comparison", ("model", "verdict", *_COLUMNS), tuple(rows))


def write_card(reports: Sequence[Report]) -> str:
    """Return the table and how it was measured, as Markdown for a model card."""
    report = reports[0]
    settings = report.recipe["verify"]
    asked = _describe_questions(report)
    basis = (
        f"{asked}, {settings['samples']} answers each, "
        f"temperature {settings['temperature']:g}, at most {settings['max_new_tokens']:,} tokens; "
        f"{_describe_measurement(report)}"
    )
    table = write_table(make_comparison_table(reports))
    return f"{table}\n\n{escape(basis)}"


def _describe_questions(report: Report) -> str:
    """Return the number of questions, and of what."""
    known = report.recipe
    count = known["verify"]["count"]
    tasks = ", ".join(known["tasks"]) or "the procedural tasks of racdeploy"
    questions = f"{count:,} questions of {tasks}"

    comparison = report.comparison
    if comparison and comparison.planned:
        return f"Until each verdict was clear, at most {questions}"
    return questions


def _describe_measurement(report: Report) -> str:
    """Return the intervals and the machine."""
    comparison = report.comparison
    confidence = comparison.confidence if comparison else 0.9
    intervals = f"{format_confidence(confidence)} intervals"
    if comparison and comparison.planned:
        intervals = "repeated confidence intervals"

    machine = report.fingerprint
    engine = ", ".join(f"{name} {machine[name]}" for name in ("llama-cpp-python", "onnxruntime"))
    return (
        f"{intervals} over paired questions. {machine['processor']}, {engine}, "
        f"racdeploy {machine['racdeploy']}."
    )


def _fill(name: str, verdict: str, arm: ArmSummary, report: Report | None) -> tuple[str, ...]:
    comparison = report.comparison if report else None
    columns = dict(_COLUMNS)
    if comparison is None:
        for column, cell in _COLUMNS.items():
            if "{1" in cell:  # a figure of the comparison
                columns[column] = ""
    return (to_single_line(name), verdict, *fill_cells(columns, arm, comparison))

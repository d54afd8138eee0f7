"""A report as one HTML file: no network, no script, light and dark, usable with the keyboard alone.

Below 2 MB: long thinking is cut and late prompts are left to ``records.jsonl``; the page says so.
Prompts and answers are hostile text: the template escapes everything, and a content security policy
forbids scripts should anything slip through. So the filters are radio buttons and style rules.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from markupsafe import Markup

from racdeploy.report import charts
from racdeploy.report.axis import load_templates
from racdeploy.report.front import front, who_wins
from racdeploy.report.highlights import highlights
from racdeploy.report.model import Record, Report
from racdeploy.report.summary import explanation
from racdeploy.report.tables import tables, visible

_TEXT_BUDGET_BYTES = 1_200_000
_TEXT_CHARACTERS = 24_000
_ROWS = 200
_TASKS = 12
_QUANTILES = {"shortest": 0, "half are at most": 0.5, "nine of ten are at most": 0.9, "longest": 1}

Pair = tuple[Record, Record]
"""Dense and pruned on one prompt."""


@dataclass(frozen=True)
class _Disagreement:
    """One prompt on which exactly one arm was right."""

    dense: Record
    pruned: Record

    @property
    def outcome(self) -> str:
        return "lost" if self.dense.correct else "won"

    @property
    def unclosed(self) -> bool:
        """Whether one of the thoughts did not end."""
        return "open" in (self.dense.state, self.pruned.state)

    @property
    def shared(self) -> int:
        """Characters with which both thoughts begin, up to the end of a word."""
        dense = _cut(self.dense.thinking_text)
        pruned = _cut(self.pruned.thinking_text)
        if dense == pruned:
            return len(dense)

        length = min(len(dense), len(pruned))
        differing = (place for place in range(length) if dense[place] != pruned[place])
        prefix = dense[: next(differing, length)]
        return max(prefix.rfind(" "), prefix.rfind("\n")) + 1


def render(report: Report, records: Sequence[Record] = ()) -> str:
    """Return the page; of the records only those of the arms ``dense`` and ``pruned`` are drawn."""
    paired = _pair(records)
    different = [pair for pair in paired if pair[0].correct != pair[1].correct]
    shown = _within_budget([_Disagreement(*pair) for pair in different])

    return (
        load_templates()
        .get_template("report.html.jinja")
        .render(
            _draw_charts(report, paired),
            cut=_cut,
            report=report,
            explanation=explanation(report),
            highlights=highlights(report),
            tables={table.title: table for table in tables(report)},
            row_limit=_ROWS,
            winners=who_wins(report),
            quantiles=_length_quantiles(paired),
            pairs=len(paired),
            disagreements=shown,
            disagreement_count=len(different),
            task_filters=_task_filters(shown),
            recipe=_readable(report.recipe),
            fingerprint=_readable(report.fingerprint),
        )
    )


def _draw_charts(report: Report, paired: Sequence[Pair]) -> dict[str, Markup]:
    arms, linears, best = report.arms, report.linears, front(report.arms)
    cap = report.comparison.length_budget_tokens if report.comparison else None
    dense, pruned = _lengths(paired)

    return {
        "accuracy_chart": charts.accuracy_against_length(arms),
        "size_chart": charts.accuracy_against_size(arms, best),
        "speed_chart": charts.accuracy_against_speed(arms, best),
        "divergence_chart": charts.divergence_along(report.positions),
        "scatter_chart": charts.paired_lengths(paired, cap),
        "histogram_chart": charts.length_histogram(dense, pruned, cap),
        "widths_chart": charts.widths_by_block(report.structure),
        "recovery_chart": charts.recovery_over_tokens(report.recovery),
        "sparsity_chart": charts.heat_map(
            "Sparsity by linear", linears, attrgetter("sparsity_reached")
        ),
        "error_chart": charts.heat_map(
            "Held-out error by linear", linears, attrgetter("held_out_error")
        ),
    }


def _pair(records: Sequence[Record]) -> list[Pair]:
    """Match the two arms' records by prompt and sample, in prompt order."""
    by_arm: dict[str, dict[tuple[int, int], Record]] = {"dense": {}, "pruned": {}}
    for record in records:
        if record.arm in by_arm:
            by_arm[record.arm][record.prompt, record.sample] = record

    dense, pruned = by_arm["dense"], by_arm["pruned"]
    return [(dense[key], pruned[key]) for key in sorted(dense.keys() & pruned.keys())]


def _length_quantiles(paired: Sequence[Pair]) -> list[tuple[str, int, int]]:
    """Return name, dense and pruned value of the thinking lengths' quantiles."""
    if not paired:
        return []

    dense, pruned = _lengths(paired)
    dense.sort()
    pruned.sort()

    found = []
    for name, share in _QUANTILES.items():
        place = max(math.ceil(share * len(paired)) - 1, 0)
        found.append((name, dense[place], pruned[place]))

    return found


def _lengths(paired: Sequence[Pair]) -> tuple[list[int], list[int]]:
    dense = [record.thinking_tokens for record, _ in paired]
    pruned = [record.thinking_tokens for _, record in paired]
    return dense, pruned


def _within_budget(disagreements: Sequence[_Disagreement]) -> list[_Disagreement]:
    """Return the prompts whose texts fit on the page, those that pruning lost first."""
    shown = []
    left_bytes = _TEXT_BUDGET_BYTES
    for found in sorted(disagreements, key=lambda found: found.outcome):  # "lost" before "won"
        left_bytes -= _page_bytes(found.dense) + _page_bytes(found.pruned)
        if left_bytes < 0:
            break
        shown.append(found)

    return shown


def _task_filters(shown: Sequence[_Disagreement]) -> dict[str, int]:
    """Return the tasks to filter by with their prompts, the most frequent first."""
    counts = Counter(found.dense.task for found in shown)
    return dict(counts.most_common(_TASKS)) if len(counts) > 1 else {}


def _page_bytes(record: Record) -> int:
    text = _cut(record.question) + _cut(record.gold)
    text += _cut(record.answer_text) + _cut(record.thinking_text)
    special = sum(text.count(character) for character in "<>&'\"")

    # Escaping adds at most five bytes to a character; 1,500 are the markup of one side.
    return len(text.encode()) + 5 * special + 1500


def _cut(text: str) -> str:
    text = visible(text)
    more = len(text) - _TEXT_CHARACTERS
    if more <= 0:
        return text
    return f"{text[:_TEXT_CHARACTERS]}\n… {more} more characters in records.jsonl"


def _readable(settings: dict[str, object]) -> str:
    if not settings:
        return ""
    return visible(json.dumps(settings, indent=2, ensure_ascii=False, default=str))

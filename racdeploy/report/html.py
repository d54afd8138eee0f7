"""A report as one HTML file: no network, no script, light and dark, every part reachable by keyboard.

The page holds all tables, the charts, and the prompts on which the arms disagree with their thinking side by
side. It stays below 2 MB: long thinking is cut, late prompts are left to ``records.jsonl``, and it says so.
Prompts and answers are hostile text: the template escapes everything, and a content security policy forbids
scripts should anything slip through. So the filters are radio buttons and style rules, which also work where a CI
server shows pages without scripts.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup

from racdeploy.report import charts
from racdeploy.report.front import front, who_wins
from racdeploy.report.highlights import highlights
from racdeploy.report.model import Record, Report
from racdeploy.report.tables import explanation, plain, tables, visible

_TEXT_BUDGET_BYTES = 1_200_000
_TEXT_CHARACTERS = 24_000
_ROWS = 200
_TASKS = 12


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
        dense, pruned = _cut(self.dense.thinking_text), _cut(self.pruned.thinking_text)
        if dense == pruned:
            return len(dense)
        differs = (place for place, (a, b) in enumerate(zip(dense, pruned, strict=False)) if a != b)
        prefix = dense[: next(differs, min(len(dense), len(pruned)))]
        return max(prefix.rfind(" "), prefix.rfind("\n")) + 1


def render(report: Report, records: Sequence[Record] = ()) -> str:
    """Return the page.

    Args:
        report: what was found.
        records: one per prompt, arm and sample; only the arms ``dense`` and ``pruned`` are drawn.
    """
    paired = _pair(records)
    disagreements = [
        _Disagreement(dense, pruned) for dense, pruned in paired if dense.correct != pruned.correct
    ]
    shown = _within_budget(disagreements)
    cap = report.comparison.length_budget_tokens if report.comparison else None
    best = front(report.arms)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cut=_cut, plain=plain)
    folder = files("racdeploy.report")
    source = folder.joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        style=Markup(folder.joinpath("report.css").read_text(encoding="utf-8")),
        report=report,
        explanation=explanation(report),
        highlights=highlights(report),
        tables={table.title: table for table in tables(report)},
        row_limit=_ROWS,
        accuracy_chart=charts.accuracy_against_length(report.arms),
        size_chart=charts.accuracy_against_size(report.arms, best),
        speed_chart=charts.accuracy_against_speed(report.arms, best),
        divergence_chart=charts.divergence_along(report.positions),
        winners=who_wins(report),
        scatter_chart=charts.paired_lengths(_length_pairs(paired), cap),
        histogram_chart=charts.length_histogram(
            [dense.thinking_tokens for dense, _ in paired],
            [pruned.thinking_tokens for _, pruned in paired],
            cap,
        ),
        quantiles=_length_quantiles(paired),
        sparsity_chart=charts.heat_map(
            report.linears, lambda row: row.sparsity_reached, "Sparsity by linear"
        ),
        error_chart=charts.heat_map(
            report.linears, lambda row: row.held_out_error, "Held-out error by linear"
        ),
        pairs=len(paired),
        disagreements=shown,
        disagreement_count=len(disagreements),
        task_filters=_task_filters(shown),
        recipe=_readable(report.recipe),
        fingerprint=_readable(report.fingerprint),
    )


def _pair(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Match the two arms' records by prompt and sample, in prompt order."""
    by_arm: dict[str, dict[tuple[int, int], Record]] = {"dense": {}, "pruned": {}}
    for record in records:
        if record.arm in by_arm:
            by_arm[record.arm][record.prompt, record.sample] = record
    dense, pruned = by_arm["dense"], by_arm["pruned"]
    return [(dense[key], pruned[key]) for key in sorted(dense.keys() & pruned.keys())]


def _length_pairs(paired: Sequence[tuple[Record, Record]]) -> list[charts.LengthPair]:
    outcomes = {(True, False): "lost", (False, True): "won"}
    return [
        charts.LengthPair(
            dense.prompt,
            dense.thinking_tokens,
            pruned.thinking_tokens,
            outcomes.get((dense.correct, pruned.correct), "same"),
        )
        for dense, pruned in paired
    ]


def _length_quantiles(paired: Sequence[tuple[Record, Record]]) -> list[tuple[str, int, int]]:
    """Return name, dense and pruned value of the thinking lengths' quantiles; none without answers."""
    dense = sorted(record.thinking_tokens for record, _ in paired)
    pruned = sorted(record.thinking_tokens for _, record in paired)
    shares = {
        "shortest": 0.0,
        "half are at most": 0.5,
        "nine of ten are at most": 0.9,
        "longest": 1.0,
    }
    places = {name: max(math.ceil(share * len(paired)) - 1, 0) for name, share in shares.items()}
    return [(name, dense[place], pruned[place]) for name, place in places.items() if paired]


def _within_budget(disagreements: Sequence[_Disagreement]) -> list[_Disagreement]:
    """Return the prompts whose texts fit on the page, those that pruning lost first."""
    shown, left_bytes = [], _TEXT_BUDGET_BYTES
    for disagreement in sorted(
        disagreements, key=lambda found: found.outcome
    ):  # "lost" before "won"
        left_bytes -= sum(
            _page_bytes(record) for record in (disagreement.dense, disagreement.pruned)
        )
        if left_bytes < 0:
            break
        shown.append(disagreement)
    return shown


def _task_filters(shown: Sequence[_Disagreement]) -> dict[str, int]:
    """Return the tasks to filter by with their prompts, the most frequent first; none where one task is all."""
    counts = Counter(found.dense.task for found in shown).most_common(_TASKS)
    return dict(counts) if len(counts) > 1 else {}


def _page_bytes(record: Record) -> int:
    texts = [
        _cut(text)
        for text in (record.question, record.gold, record.answer_text, record.thinking_text)
    ]
    # Five bytes stand for what escaping adds to the characters it touches.
    special = sum(text.count(character) for text in texts for character in "<>&'\"")
    return sum(len(text.encode()) for text in texts) + 5 * special + 1500


def _cut(text: str) -> str:
    text = visible(text)
    if len(text) <= _TEXT_CHARACTERS:
        return text
    return f"{text[:_TEXT_CHARACTERS]}\n… {len(text) - _TEXT_CHARACTERS} more characters in records.jsonl"


def _readable(settings: dict[str, object]) -> str:
    return (
        visible(json.dumps(settings, indent=2, ensure_ascii=False, default=str)) if settings else ""
    )

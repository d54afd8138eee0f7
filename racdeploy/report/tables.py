"""The tables of a report as plain text, for every output, and how numbers are written in them.

Each output escapes for itself. Cells are single lines without control characters.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from racdeploy.files.unprintable import visible
from racdeploy.report.structure import list_kept
from racdeploy.results.answers import HarnessRun
from racdeploy.results.checks import CheckResult
from racdeploy.results.pruning import VECTORS_IN_F32, BlockRow, LinearRow, end_phases
from racdeploy.results.report import Report
from racdeploy.results.units import points

_NONE = "–"
# A figure with its unit, how many of how many, or its interval; no words after that.
_NUMBER = re.compile(r"[−+]?[\d.,]+ ?(%|[kMG]?B|of [\d,]+)?( \([^)]*\)| in (all|each).*)?$")
_BY_NEED = ("fail", "inconclusive", "pass", "measured", "skipped")
# Half a per mille: N of M in a row that is no multiple of M rounds by less.
_SPARSITY_TOLERANCE = 5e-4

Row = tuple[str, ...]
_ARM = {
    "model": "{0.name}",
    "accuracy (95%)": "{0.accuracy:.1%} ({0.accuracy_lower:.1%} to {0.accuracy_upper:.1%})",
    "thinking tokens": "{0.thinking_tokens_mean:,.1f}",
    "unclosed": "{0.unclosed:,} of {0.prompts:,}",
    "forced": "{0.forced:,}",
    "cut": "{0.cut:,}",
    "size": "{0.size_bytes:bytes}",
    "tokens/s": "{0.tokens_per_s:,.0f}",
    "quant": "{0.quant}",
    "sparsity": "{0.sparsity:.1%}",
}
_PHASE = {
    "phase": "{0.phase}",
    "tokens": "{0.tokens:,}",
    "KL on held-out traces, nats": "{0.kl_nats:.3g}",
    "calibration prompts right": "{0.accuracy:.1%}",
    "entered the model": "{1}",
}
HARNESS = "Evaluation harness"
LENGTH = "{0.length_ratio:ratio} times as long"
LENGTH_INTERVAL = "{0.length_lower:ratio} to {0.length_upper:ratio}"


@dataclass(frozen=True)
class Table:
    """A titled table; every row has as many cells as ``columns``."""

    title: str
    columns: Row
    rows: tuple[Row, ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers alone, and are aligned to the right; the first names rows."""
        found = []
        for place in range(len(self.columns)):
            cells = [row[place] for row in self.rows if row[place] not in ("", _NONE)]
            found.append(place > 0 and bool(cells) and all(map(_NUMBER.match, cells)))
        return tuple(found)

    def turn(self) -> Table:
        """Return the table with a column for each row."""
        head, *rows = zip(self.columns, *self.rows, strict=True)
        return Table(self.title, head, tuple(rows))


def tables(report: Report) -> list[Table]:
    """Return every table that has a row, in reading order."""
    kept = list_kept(report.kept, report.structure)
    drift = "Drift from the dense model, worst first"
    arms = [arm.model_copy(update={"quant": arm.quant or None}) for arm in report.arms]
    phases = [(end, "yes" if end.kept else "no, undone") for end in end_phases(report.recovery)]
    candidates: dict[tuple[str, str], list[Row]] = {
        ("Dense and pruned", "|".join(_ARM)): [_fill(_ARM, arm) for arm in arms],
        ("Kept", "what|dense|pruned|kept"): [part.row for part in kept],
        ("Recovery", "|".join(_PHASE)): [_fill(_PHASE, *phase) for phase in phases],
        ("Tasks", "task|prompts|dense|pruned"): _tasks(report),
        (HARNESS, _harness_columns(report.harness)): _harness(report.harness),
        ("Checks", "check|verdict|found"): [
            (check.name, check.verdict, check.summary) for check in _by_need(report.checks)
        ],
        (drift, "held-out traces|hidden state after the last block"): _drift(report.blocks),
        ("Not as asked", "what|asked|real|where|why"): _deviations(report),
    }

    return make_tables(candidates)


def make_tables(candidates: Mapping[tuple[str, str], Sequence[Row]]) -> list[Table]:
    """Return a table for each title and its columns, where there is a row."""
    found = []
    for (title, columns), rows in candidates.items():
        cells = [tuple(plain(cell) for cell in row) for row in rows]
        if cells:
            found.append(Table(title, tuple(columns.split("|")), tuple(cells)))

    return found


def list_next_steps(report: Report) -> list[str]:
    """Return what checks that did not pass advise, each advice once with those that give it."""
    steps: dict[str, list[str]] = defaultdict(list)
    for check in _by_need(report.checks):
        if check.remedy and check.verdict != "pass":
            steps[check.remedy].append(check.name)

    return [plain(f"{', '.join(names)}: {step}") for step, names in steps.items()]


def plain(text: str) -> str:
    """Return the text on one line, with :func:`visible` applied."""
    return " ".join(visible(text).split())


def shorten(text: str, characters: int) -> str:
    """Return the text on one line, cut with a sign where it is longer."""
    text = plain(text)
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def readable_bytes(size_bytes: int) -> str:
    """Return a size with three digits and a decimal unit, as file managers show it."""
    if size_bytes < 1000:
        return f"{size_bytes} B"

    value = size_bytes / 1000
    for unit in ("kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000

    return f"{value:.3g} TB"


def number(value: float) -> str:
    """Return a number with thousands separators and a true minus sign; six digits below 1,000."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "−")


def ratio_text(value: float | None) -> str:
    """Return a ratio with two digits, also where it has no upper end or was not measured."""
    if value is None:
        return "unknown"
    return "∞" if math.isinf(value) else f"{value:.2f}"


def share_range(shares: Iterable[float]) -> str:
    """Return the least and the largest share in per cent, one where they look alike."""
    in_order = sorted(shares)
    low, high = f"{in_order[0]:.1%}", f"{in_order[-1]:.1%}"
    return low if low == high else f"{low} to {high}"


def speed_text(tokens_per_s: float) -> str:
    """Return tokens a second with three digits at least."""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"


class _Units(string.Formatter):
    """Formats numbers in a report's units: ``bytes``, ``points``, ``ratio`` and ``speed``.

    None is a dash.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec == "ratio":
            return ratio_text(value)
        if value is None:
            return _NONE

        units = {"bytes": readable_bytes, "points": points, "speed": speed_text}
        unit = units.get(format_spec)
        return unit(value) if unit else str(super().format_field(value, format_spec))


def say(template: str, *values: object) -> str:
    """Return a text of :meth:`str.format` with the units of a report."""
    return _Units().format(template, *values)


def _fill(cells: Mapping[str, str], *values: object) -> Row:
    return tuple(say(cell, *values) for cell in cells.values())


def _tasks(report: Report) -> list[Row]:
    rows: list[Row] = []
    for task in report.tasks:
        name = f"{task.task}, as {task.follows}" if task.follows else task.task
        counts = [_NONE, _NONE]
        if task.prompts:
            right = (task.dense_correct, task.pruned_correct)
            counts = [f"{count:,} ({count / task.prompts:.1%})" for count in right]
        rows.append((name, f"{task.prompts:,}", *counts))
    return rows


def _harness_columns(run: HarnessRun | None) -> str:
    if run is None:
        return ""
    asked = plain(f"{run.name} {run.version}").replace("|", " ")
    return f"{asked}|documents|dense|pruned|difference ({run.confidence:.0%})|lost|won"


def _harness(run: HarnessRun | None) -> list[Row]:
    """Return figures in the harness's own unit, with its own standard errors."""
    rows: list[Row] = []
    for row in run.rows if run else ():
        rest = f", {row.unpaired}"
        if not row.unpaired:
            rest = f" ({_decimals(row.lower)} to {_decimals(row.upper)})"

        rows.append(
            (
                f"{row.task}, {row.metric}",
                f"{row.documents:,}",
                _figure(row.dense, row.dense_stderr),
                _figure(row.pruned, row.pruned_stderr),
                f"{_decimals(row.difference)}{rest}",
                say("{:,}", row.lost),
                say("{:,}", row.won),
            )
        )
    return rows


def _figure(value: float, stderr: float | None) -> str:
    return _decimals(value) if stderr is None else f"{_decimals(value)} (± {_decimals(stderr)})"


def _decimals(value: float | None) -> str:
    """Return a figure as harnesses print it."""
    return say("{:.4f}", value).replace("-0.0000", "0.0000").replace("-", "−")


def _by_need(checks: Iterable[CheckResult]) -> list[CheckResult]:
    """Return the checks, those that need an eye first."""
    return sorted(checks, key=lambda check: _BY_NEED.index(check.verdict))


def _drift(blocks: Sequence[BlockRow]) -> list[Row]:
    """Return the relative error of each task and each stream, of either kind the worst first."""
    rows: list[Row] = []
    for last in blocks[-1:]:
        kinds = {"task": last.drift_by_task, "tokens of the": last.drift_by_stream}
        for kind, errors in kinds.items():
            worst_first = sorted(errors.items(), key=lambda item: -item[1])
            rows += [(f"{kind} {name}", f"{error:.2%}") for name, error in worst_first]
    return rows


def _deviations(report: Report) -> list[Row]:
    """Return what was not pruned or not exported as asked, alike ones together."""
    rows = _unpruned(report.linears)
    for row in report.deviations:
        rows.append((row.what, row.asked, row.real, "the file", row.reason))

    quants: dict[Row, list[str]] = defaultdict(list)
    packings: dict[Row, list[str]] = defaultdict(list)

    for tensor in report.tensors:
        if tensor.reason == VECTORS_IN_F32:  # nobody asks for anything else
            continue

        asked, real = tensor.quant_asked, tensor.quant_real
        if tensor.reason or asked != real:
            reason = tensor.reason or "no reason was recorded"
            quants["quant", asked, real, reason].append(tensor.name)

        if tensor.packing_reason:
            packing = ("packing", "packed", tensor.packing, tensor.packing_reason)
            packings[packing].append(tensor.name)

    for (what, asked, real, reason), names in (*quants.items(), *packings.items()):
        rows.append((what, asked, real, _where(names), reason))
    return rows


def _unpruned(linears: Iterable[LinearRow]) -> list[Row]:
    groups: dict[Row, list[LinearRow]] = defaultdict(list)
    for linear in linears:
        if abs(linear.sparsity_asked - linear.sparsity_reached) > _SPARSITY_TOLERANCE:
            reason = linear.reason or "the method reached another sparsity than it was asked for"
            groups[f"{linear.sparsity_asked:.1%}", reason].append(linear)

    rows: list[Row] = []
    for (asked, reason), alike in groups.items():
        real = share_range([linear.sparsity_reached for linear in alike])
        rows.append(("sparsity", asked, real, _where([linear.name for linear in alike]), reason))
    return rows


def _where(names: Sequence[str]) -> str:
    """Return one name, or how many there are of each kind, numbers in the names left out."""
    if len(names) == 1:
        return names[0]

    kinds = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items())

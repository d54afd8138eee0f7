"""Tables of a report as plain text, for every output, and the formatting of their numbers.

Cells are single lines without control characters; each output escapes them itself.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from racdeploy.files.unprintable import replace_unprintable
from racdeploy.report.structure import list_remaining
from racdeploy.results.answers import HarnessRun
from racdeploy.results.checks import CheckResult
from racdeploy.results.pruning import VECTORS_IN_F32, LinearRow, list_phase_ends
from racdeploy.results.report import Report
from racdeploy.results.units import format_confidence, format_points

NONE = "–"
"""Cell of a figure that is not known."""
# A figure with its unit, "N of M", or its interval, without words after it.
_NUMBER = re.compile(r"[−+]?[\d.,]+ ?(%|[kMG]?B|of [\d,]+)?( \([^)]*\)| in (all|each).*)?$")
_VERDICT_ORDER = ("fail", "inconclusive", "pass", "measured", "skipped")
# Half a per mille: N:M rounds by less in a row whose length is not a multiple of M.
_SPARSITY_TOLERANCE = 5e-4

TableRow = tuple[str, ...]
_ARM = {
    "model": "{0.name}",
    "accuracy (95%)": "{0.accuracy:.1%} ({0.accuracy_lower:.1%} to {0.accuracy_upper:.1%})",
    "thinking tokens": "{0.thinking_tokens_mean:,.1f}",
    "unclosed": "{0.unclosed:,} of {0.prompts:,}",
    "forced": "{0.forced:,}",
    "truncated": "{0.truncated:,}",
    "size": "{0.size_bytes:bytes}",
    "tokens/s": "{0.tokens_per_s:,.0f}",
    "s per right answer": "{0.seconds_per_right:.3g}",
    "quant": "{0.quant}",
    "sparsity": "{0.sparsity:.1%}",
}
_PHASE = {
    "phase": "{0.phase}",
    "tokens": "{0.tokens:,}",
    "KL on held-out traces, nats": "{0.kl_nats:.3g}",
    "calibration prompts right": "{0.accuracy:.1%}",
    "kept": "{1}",
}
_RIVAL = {
    "dense model": "{0.name}",
    "points over pruned": "{0.gain:points} ({0.gain_lower:points} to {0.gain_upper:points})",
    "times its thinking": "{0.length_ratio:.2f} ({0.length_lower:.2f} to {0.length_upper:.2f})",
}
HARNESS_TITLE = "Evaluation harness"


@dataclass(frozen=True)
class ReportTable:
    """Table with a title; every row has as many cells as ``columns``."""

    title: str
    columns: TableRow
    rows: tuple[TableRow, ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """True for columns of numbers, which are aligned to the right; the first names the rows."""
        flags = []
        for index in range(len(self.columns)):
            cells = [row[index] for row in self.rows if row[index] not in ("", NONE)]
            flags.append(index > 0 and bool(cells) and all(map(_NUMBER.match, cells)))
        return tuple(flags)

    def transpose(self) -> ReportTable:
        """Return the transposed table, with a column for each row."""
        head, *rows = zip(self.columns, *self.rows, strict=True)
        return ReportTable(self.title, head, tuple(rows))


def list_tables(report: Report) -> list[ReportTable]:
    """Return every table with rows, in reading order."""
    kept = list_remaining(report.kept_structure, report.structure)
    # An unknown quant becomes a dash, like any other None.
    roles = dict(zip(("dense", "pruned"), report.roles, strict=True))
    dense, pruned = report.roles
    arms = [
        arm.model_copy(update={"quant": arm.quant or None, "name": roles.get(arm.name, arm.name)})
        for arm in report.arms
    ]
    columns = dict(_ARM)
    if report.reference:
        del columns["sparsity"]

    arm_rows = [fill_cells(columns, arm) for arm in arms]
    rivals = [fill_cells(_RIVAL, row) for row in report.rivals]
    phase_rows = []
    for end in list_phase_ends(report.recovery):
        phase_rows.append(fill_cells(_PHASE, end, "yes" if end.kept else "no, undone"))

    checks = [(check.name, check.verdict, check.summary) for check in _sort_checks(report.checks)]
    tables = [
        make_table(report.both_roles, columns, arm_rows),
        make_table("Comparison with dense models", _RIVAL, rivals),
        make_table("Structure", ("part", "dense", "pruned", "kept"), [part.row for part in kept]),
        make_table("Recovery", _PHASE, phase_rows),
        make_table("Tasks", ("task", "prompts", dense, pruned), _tasks(report)),
    ]
    if report.harness:
        tables.append(_harness(report.harness))
    tables += [
        make_table("Checks", ("check", "verdict", "result"), checks),
        _drifts(report),
        make_table(
            "Deviations",
            ("property", "requested", "actual", "where", "reason"),
            _deviations(report),
        ),
    ]
    return [table for table in tables if table.rows]


def make_table(title: str, columns: Iterable[str], rows: Iterable[TableRow]) -> ReportTable:
    """Return a table, each cell of its rows on one line."""
    single_lines = tuple(tuple(map(to_single_line, row)) for row in rows)
    return ReportTable(title, tuple(columns), single_lines)


def list_next_steps(report: Report) -> list[str]:
    """Return the remedies of checks that did not pass, each once with the names of its checks."""
    steps: dict[str, list[str]] = defaultdict(list)
    for check in _sort_checks(report.checks):
        if check.remedy and check.verdict != "pass":
            steps[check.remedy].append(check.name)

    return [to_single_line(f"{', '.join(names)}: {step}") for step, names in steps.items()]


def to_single_line(text: str) -> str:
    """Return the text on one line, without control characters."""
    return " ".join(replace_unprintable(text).split())


def shorten(text: str, characters: int) -> str:
    """Return the text on one line, truncated with "…" to a number of characters."""
    text = to_single_line(text)
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def format_bytes(size_bytes: int) -> str:
    """Return a size with three digits and a decimal unit, as file managers show it."""
    if size_bytes < 1000:
        return f"{size_bytes} B"

    value = size_bytes / 1000
    for unit in ("kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000

    return f"{value:.3g} TB"


def format_number(value: float) -> str:
    """Return a number with thousands separators and a true minus sign; six digits below 1,000."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "−")


def format_ratio(value: float | None) -> str:
    """Return a ratio with two decimals; infinite and unmeasured ones have a text of their own."""
    if value is None:
        return "unknown"
    return "∞" if math.isinf(value) else f"{value:.2f}"


def format_share_range(shares: Iterable[float]) -> str:
    """Return the smallest and largest share in per cent, as one number if both print the same."""
    in_order = sorted(shares)
    low, high = f"{in_order[0]:.1%}", f"{in_order[-1]:.1%}"
    return low if low == high else f"{low} to {high}"


def format_duration(seconds: float) -> str:
    """Return a duration with its unit: seconds, minutes or hours."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"

    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"

    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def format_figure(value: float) -> str:
    """Return seconds or tokens per second with at least three digits; infinite ones are "∞"."""
    if math.isinf(value):
        return format_ratio(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class _Units(string.Formatter):
    """Formatter with a report's units.

    These are ``bytes``, ``confidence``, ``points``, ``ratio`` and ``speed``. None is printed as a
    dash.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None and format_spec != "ratio":
            return NONE

        units = {
            "bytes": format_bytes,
            "confidence": format_confidence,
            "points": format_points,
            "ratio": format_ratio,
            "speed": format_figure,
        }
        unit = units.get(format_spec)
        return unit(value) if unit else str(super().format_field(value, format_spec))


def format_with_units(template: str, *values: object) -> str:
    """Format a template like :meth:`str.format`, with the units of a report."""
    return _Units().format(template, *values)


def fill_cells(cells: Mapping[str, str], *values: object) -> TableRow:
    """Return a row of the templates of its cells, filled in with some values."""
    return tuple(format_with_units(cell, *values) for cell in cells.values())


def _drifts(report: Report) -> ReportTable:
    """Return the error after the last block by task, then by segment, each the worst first."""
    rows: list[TableRow] = []
    for last in report.blocks[-1:]:
        kinds = {"task": last.drift_by_task, "tokens of the": last.drift_by_segment}
        for kind, errors in kinds.items():
            worst_first = sorted(errors.items(), key=lambda item: -item[1])
            rows += [(f"{kind} {name}", f"{error:.2%}") for name, error in worst_first]

    columns = ("held-out traces", "hidden state after the last block")
    return make_table("Drift from the dense model, worst first", columns, rows)


def _tasks(report: Report) -> list[TableRow]:
    rows = []
    for task in report.tasks:
        name = f"{task.task}, as {task.protocol}" if task.protocol else task.task
        counts = [NONE, NONE]
        if task.prompts:
            right = (task.dense_correct, task.pruned_correct)
            counts = [f"{count:,} ({count / task.prompts:.1%})" for count in right]
        rows.append((name, f"{task.prompts:,}", *counts))
    return rows


def _harness(run: HarnessRun) -> ReportTable:
    """Return the table of the harness's figures, in its own unit with its own standard errors."""
    harness = to_single_line(f"{run.name} {run.version}")
    difference = f"difference ({run.confidence:.0%})"
    columns = (harness, "documents", "dense", "pruned", difference, "lost", "won")

    rows: list[TableRow] = []
    for row in run.rows:
        rest = f", {row.unpaired_reason}"
        if not row.unpaired_reason:
            rest = f" ({_decimals(row.lower)} to {_decimals(row.upper)})"

        rows.append(
            (
                f"{row.task}, {row.metric}",
                f"{row.documents:,}",
                _figure(row.dense, row.dense_stderr),
                _figure(row.pruned, row.pruned_stderr),
                f"{_decimals(row.difference)}{rest}",
                format_with_units("{:,}", row.lost),
                format_with_units("{:,}", row.won),
            )
        )
    return make_table(HARNESS_TITLE, columns, rows)


def _figure(value: float, stderr: float | None) -> str:
    return _decimals(value) if stderr is None else f"{_decimals(value)} (± {_decimals(stderr)})"


def _decimals(value: float | None) -> str:
    """Return a figure with four decimals, as harnesses print it."""
    return format_with_units("{:.4f}", value).replace("-0.0000", "0.0000").replace("-", "−")


def _sort_checks(checks: Iterable[CheckResult]) -> list[CheckResult]:
    """Return the checks, those that need attention first."""
    return sorted(checks, key=lambda check: _VERDICT_ORDER.index(check.verdict))


def _deviations(report: Report) -> list[TableRow]:
    """Return pruning and export that differ from the request, with equal rows merged."""
    rows = _unpruned(report.linears)
    for row in report.deviations:
        rows.append((row.subject, row.requested, row.actual, "the file", row.reason))

    quants: dict[TableRow, list[str]] = defaultdict(list)
    packings: dict[TableRow, list[str]] = defaultdict(list)

    for tensor in report.tensors:
        if tensor.reason == VECTORS_IN_F32:  # true of every file
            continue

        requested, actual = tensor.requested_quant, tensor.actual_quant
        if tensor.reason or requested != actual:
            reason = tensor.reason or "no reason was recorded"
            quants["quant", requested, actual, reason].append(tensor.name)

        if tensor.packing_reason:
            packing = ("packing", "packed", tensor.packing, tensor.packing_reason)
            packings[packing].append(tensor.name)

    for (subject, requested, actual, reason), names in (*quants.items(), *packings.items()):
        rows.append((subject, requested, actual, _where(names), reason))
    return rows


def _unpruned(linears: Iterable[LinearRow]) -> list[TableRow]:
    """Return linears whose sparsity is not the requested one, merged by request and reason."""
    groups: dict[TableRow, list[LinearRow]] = defaultdict(list)
    for linear in linears:
        if abs(linear.requested_sparsity - linear.actual_sparsity) > _SPARSITY_TOLERANCE:
            reason = linear.reason or "the method reached another sparsity than requested"
            groups[f"{linear.requested_sparsity:.1%}", reason].append(linear)

    rows: list[TableRow] = []
    for (requested, reason), group in groups.items():
        actual = format_share_range([linear.actual_sparsity for linear in group])
        rows.append(
            ("sparsity", requested, actual, _where([linear.name for linear in group]), reason)
        )
    return rows


def _where(names: Sequence[str]) -> str:
    """Return one name, or the count of each kind of name, with "*" in place of numbers."""
    if len(names) == 1:
        return names[0]

    kinds = Counter(re.sub(r"\d+", "*", name) for name in names)
    words = []
    for kind, count in kinds.items():
        words.append(f"{count} × {kind}" if count > 1 else kind)
    return ", ".join(words)

"""The words of a report: a headline, its explanation and tables of plain text, for every output.

Knows no markup: each output escapes for itself. Cells are single lines without control characters,
so a prompt or a tensor name cannot move a cursor or break a row.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from racdeploy.report.model import ArmSummary, BlockRow, Comparison, LinearRow, Report, TensorRow

# C0 and C1 controls, bidirectional overrides, and what XML cannot hold.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_NONE = "–"
# Half a per mille: N of M in a row that is no multiple of M rounds by less.
_SPARSITY_TOLERANCE = 5e-4

Row = tuple[str, ...]
_Named = TypeVar("_Named", LinearRow, TensorRow)


@dataclass(frozen=True)
class Table:
    """A titled table; every row has as many cells as ``columns``."""

    title: str
    columns: Row
    rows: tuple[Row, ...]


def headline(report: Report) -> str:
    """Return the verdict and what it is about, without a full stop."""
    return plain(f"{report.verdict.upper()}: {report.model} for {report.target}")


def explanation(report: Report) -> str:
    """Return the checks behind a verdict that is no pass, and the numbers compared."""
    sentences = []
    if report.verdict != "pass":
        named = [check.name for check in report.checks if check.verdict == report.verdict]
        verb = "Failed" if report.verdict == "fail" else "Inconclusive"
        if named:
            sentences.append(f"{verb}: {', '.join(named)}.")
        else:
            cause = "Every check was skipped" if report.checks else "No check ran"
            sentences.append(f"{cause}, and missing data never passes.")

    if report.comparison:
        sentences.append(_compare(report.comparison))
    return plain(" ".join(sentences))


def tables(report: Report) -> list[Table]:
    """Return every table that has a row, in reading order."""
    arms = "model|accuracy (95 %)|thinking tokens|unclosed|forced|cut|size|tokens/s|quant|sparsity"
    drift = "Drift from the dense model, worst first"
    candidates = {
        ("Dense and pruned", arms): [_arm(arm) for arm in report.arms],
        ("Tasks", "task|prompts|dense|pruned"): _tasks(report),
        ("Checks", "check|verdict|found|next step"): _checks(report),
        (drift, "held-out traces|hidden state after the last block"): _drift(report.blocks),
        ("Not as asked", "what|asked|real|where|why"): _deviations(report),
    }

    found = []
    for (title, columns), rows in candidates.items():
        cells = [tuple(plain(cell) for cell in row) for row in rows]
        if cells:
            found.append(Table(title, tuple(columns.split("|")), tuple(cells)))
    return found


def plain(text: str) -> str:
    """Return the text on one line, with :func:`visible` applied."""
    return " ".join(visible(text).split())


def visible(text: str) -> str:
    """Return the text with plain line ends and without unprintable characters."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


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


def points(fraction: float) -> str:
    """Return a fraction in points of a hundred, with a true minus sign."""
    return f"{100 * fraction:.1f}".replace("-0.0", "0.0").replace("-", "−")


def ratio_text(value: float | None) -> str:
    """Return a ratio with two digits, also where it has no upper end or was not measured."""
    if value is None:
        return "unknown"
    return "∞" if math.isinf(value) else f"{value:.2f}"


def _compare(comparison: Comparison) -> str:
    """Return the sentence with the drop and, where measured, the length ratio and limits."""
    difference = "as many as"
    if comparison.drop:
        direction = "fewer" if comparison.drop > 0 else "more"
        difference = f"{points(abs(comparison.drop))} points {direction} than"

    interval = f"{points(comparison.drop_lower)} to {points(comparison.drop_upper)}"
    text = (
        f"Pruned answers {difference} dense ({comparison.confidence:.0%} interval of the drop "
        f"{interval}, margin {points(comparison.margin)}, n = {comparison.n})"
    )
    if comparison.length_ratio is None:
        return f"{text}."

    limit = f", limit {comparison.length_limit:.2f}" if comparison.length_limit else ""
    interval = f"{ratio_text(comparison.length_lower)} to {ratio_text(comparison.length_upper)}"
    ratio = ratio_text(comparison.length_ratio)
    return f"{text} and thinks {ratio} times as long ({interval}{limit})."


def _arm(arm: ArmSummary) -> Row:
    return (
        arm.name,
        f"{arm.accuracy:.1%} ({arm.accuracy_lower:.1%} to {arm.accuracy_upper:.1%})",
        _NONE if arm.thinking_tokens_mean is None else f"{arm.thinking_tokens_mean:.1f}",
        f"{arm.unclosed} of {arm.prompts}",
        str(arm.forced),
        str(arm.cut),
        _NONE if arm.size_bytes is None else readable_bytes(arm.size_bytes),
        _NONE if arm.tokens_per_s is None else f"{arm.tokens_per_s:.1f}",
        arm.quant or _NONE,
        _NONE if arm.sparsity is None else f"{arm.sparsity:.1%}",
    )


def _tasks(report: Report) -> list[Row]:
    rows: list[Row] = []
    for row in report.tasks:
        shares = (_share(row.dense_correct, row.prompts), _share(row.pruned_correct, row.prompts))
        rows.append((row.task, str(row.prompts), *shares))
    return rows


def _checks(report: Report) -> list[Row]:
    rows: list[Row] = []
    for check in report.checks:
        remedy = "" if check.verdict == "pass" else check.remedy
        rows.append((check.name, check.verdict, check.summary, remedy))
    return rows


def _drift(blocks: Sequence[BlockRow]) -> list[Row]:
    """Return the relative error of each task and each stream, of either kind the worst first."""
    if not blocks:
        return []
    last = blocks[-1]
    rows: list[Row] = []
    for kind, errors in (("task", last.drift_by_task), ("tokens of the", last.drift_by_stream)):
        worst_first = sorted(errors.items(), key=lambda item: -item[1])
        rows += [(f"{kind} {name}", f"{error:.2%}") for name, error in worst_first]
    return rows


def _deviations(report: Report) -> list[Row]:
    """Return what was not pruned or not exported as asked, alike ones together."""
    return [*_unpruned(report.linears), *_unlike(report.tensors), *_unpacked(report.tensors)]


def _unpruned(linears: Iterable[LinearRow]) -> list[Row]:
    missed = [
        row
        for row in linears
        if abs(row.sparsity_asked - row.sparsity_reached) > _SPARSITY_TOLERANCE
    ]
    default = "the method reached another sparsity than it was asked for"
    groups = _group(missed, lambda row: (f"{row.sparsity_asked:.1%}", row.reason or default))

    rows: list[Row] = []
    for (asked, reason), alike in groups.items():
        reached = [row.sparsity_reached for row in alike]
        ends = dict.fromkeys((f"{min(reached):.1%}", f"{max(reached):.1%}"))
        rows.append(("sparsity", asked, " to ".join(ends), _where(alike), reason))
    return rows


def _unlike(tensors: Iterable[TensorRow]) -> list[Row]:
    changed = [row for row in tensors if row.reason or row.quant_asked != row.quant_real]
    default = "no reason was recorded"
    groups = _group(changed, lambda row: (row.quant_asked, row.quant_real, row.reason or default))
    return [
        ("quant", asked, real, _where(alike), reason)
        for (asked, real, reason), alike in groups.items()
    ]


def _unpacked(tensors: Iterable[TensorRow]) -> list[Row]:
    plain_ones = [row for row in tensors if row.packing_reason]
    groups = _group(plain_ones, lambda row: (row.packing, row.packing_reason))
    return [
        ("packing", "packed", real, _where(alike), reason)
        for (real, reason), alike in groups.items()
    ]


def _group(rows: Iterable[_Named], key: Callable[[_Named], Row]) -> dict[Row, list[_Named]]:
    groups: dict[Row, list[_Named]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _where(rows: Sequence[LinearRow] | Sequence[TensorRow]) -> str:
    """Return one name, or how many there are of each kind, numbers in the names left out."""
    names = [row.name for row in rows]
    if len(names) == 1:
        return names[0]
    kinds = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items())


def _share(correct: int, prompts: int) -> str:
    return f"{correct} ({correct / prompts:.1%})" if prompts else _NONE

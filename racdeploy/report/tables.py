"""The words of a report: a headline, its explanation and tables of plain text, the same for every output.

Knows no markup: each output escapes for itself. Cells are single lines without control characters, so a
prompt or a tensor name cannot move a cursor or break a row.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from racdeploy.report.model import ArmSummary, BlockRow, Comparison, LinearRow, Report, TensorRow

# C0 and C1 controls, bidirectional overrides, and what XML cannot hold.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_NONE = "–"


@dataclass(frozen=True)
class Table:
    """A titled table; every row has as many cells as ``columns``."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def headline(report: Report) -> str:
    """Return the verdict and what it is about, without a full stop."""
    return plain(f"{report.verdict.upper()}: {report.model} for {report.target}")


def explanation(report: Report) -> str:
    """Return one or two sentences: the checks behind a verdict that is no pass, and the numbers compared."""
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
        sentences.append(_compared(report.comparison))
    return plain(" ".join(sentences))


def tables(report: Report) -> list[Table]:
    """Return every table that has a row, in reading order."""
    candidates = (
        Table(
            "Dense and pruned",
            ("model", "accuracy (95 %)", "thinking tokens", "unclosed", "forced", "cut", "size", "tokens/s",
             "quant", "sparsity"),
            tuple(_arm(arm) for arm in report.arms),
        ),
        Table(
            "Tasks",
            ("task", "prompts", "dense", "pruned"),
            tuple(
                (row.task, str(row.prompts), _share(row.dense_correct, row.prompts),
                 _share(row.pruned_correct, row.prompts))
                for row in report.tasks
            ),
        ),
        Table(
            "Checks",
            ("check", "verdict", "found", "next step"),
            tuple(
                (check.name, check.verdict, check.summary, "" if check.verdict == "pass" else check.remedy)
                for check in report.checks
            ),
        ),
        Table(
            "Drift from the dense model, worst first",
            ("held-out traces", "hidden state after the last block"),
            _drift(report.blocks),
        ),
        Table("Not as asked", ("what", "asked", "real", "where", "why"), _deviations(report)),
    )  # fmt: skip
    return [
        Table(
            table.title,
            table.columns,
            tuple(tuple(plain(cell) for cell in row) for row in table.rows),
        )
        for table in candidates
        if table.rows
    ]


def plain(text: str) -> str:
    """Return the text on one line, with :func:`visible` applied."""
    return " ".join(visible(text).split())


def visible(text: str) -> str:
    """Return the text with its line ends, control characters and bidirectional overrides made visible."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def readable_bytes(size_bytes: int) -> str:
    """Return a size with three digits and a decimal unit, as file managers show it."""
    value, units = float(size_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{size_bytes} B" if unit == "B" else f"{value:.3g} {unit}"


def _compared(comparison: Comparison) -> str:
    """Return the sentence with the drop and, where measured, the length ratio, each with its limit."""
    direction = "fewer" if comparison.drop > 0 else "more"
    difference = (
        f"{points(abs(comparison.drop))} points {direction} than"
        if comparison.drop
        else "as many as"
    )
    text = (
        f"Pruned answers {difference} dense "
        f"({comparison.confidence:.0%} interval of the drop {points(comparison.drop_lower)} to "
        f"{points(comparison.drop_upper)}, margin {points(comparison.margin)}, n = {comparison.n})"
    )
    if comparison.length_ratio is None:
        return f"{text}."
    limit = f", limit {comparison.length_limit:.2f}" if comparison.length_limit else ""
    return (
        f"{text} and thinks {ratio_text(comparison.length_ratio)} times as long "
        f"({ratio_text(comparison.length_lower)} to {ratio_text(comparison.length_upper)}{limit})."
    )


def _arm(arm: ArmSummary) -> tuple[str, ...]:
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


def _drift(blocks: Sequence[BlockRow]) -> tuple[tuple[str, ...], ...]:
    """Return the relative error of each task and of each stream; the worst of either kind leads it."""
    if not blocks:
        return ()
    kinds = (("task", blocks[-1].drift_by_task), ("tokens of the", blocks[-1].drift_by_stream))
    return tuple(
        (f"{kind} {name}", f"{error:.2%}")
        for kind, errors in kinds
        for name, error in sorted(errors.items(), key=lambda item: -item[1])
    )


def _deviations(report: Report) -> tuple[tuple[str, ...], ...]:
    """Return what was not pruned or not exported as asked, alike ones together."""
    return (*_unpruned(report.linears), *_unlike(report.tensors), *_unpacked(report.tensors))


def _unpruned(linears: Iterable[LinearRow]) -> list[tuple[str, ...]]:
    # Half a per mille: N of M in a row that is no multiple of M rounds by less.
    groups: dict[tuple[str, str], list[LinearRow]] = defaultdict(list)
    for row in linears:
        if abs(row.sparsity_asked - row.sparsity_reached) > 5e-4:
            reason = row.reason or "the method reached another sparsity than it was asked for"
            groups[f"{row.sparsity_asked:.1%}", reason].append(row)
    return [
        ("sparsity", asked, _reached(rows), _where([row.name for row in rows]), reason)
        for (asked, reason), rows in groups.items()
    ]


def _reached(rows: Sequence[LinearRow]) -> str:
    """Return one sparsity, or the lowest and the highest."""
    ends = [f"{end(row.sparsity_reached for row in rows):.1%}" for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def _unlike(tensors: Iterable[TensorRow]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in tensors:
        if row.reason or row.quant_asked != row.quant_real:
            reason = row.reason or "no reason was recorded"
            groups[row.quant_asked, row.quant_real, reason].append(row.name)
    return [
        ("quant", asked, real, _where(names), reason)
        for (asked, real, reason), names in groups.items()
    ]


def _unpacked(tensors: Iterable[TensorRow]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in tensors:
        if row.packing_reason:
            groups[row.packing, row.packing_reason].append(row.name)
    return [
        ("packing", "packed", real, _where(names), reason)
        for (real, reason), names in groups.items()
    ]


def _where(names: list[str]) -> str:
    """Return one name, or how many there are of each kind, numbers in the names left out."""
    if len(names) == 1:
        return names[0]
    kinds = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items())


def _share(correct: int, prompts: int) -> str:
    return f"{correct} ({correct / prompts:.1%})" if prompts else _NONE


def points(fraction: float) -> str:
    """Return a fraction in points of a hundred, with a true minus sign."""
    return f"{100 * fraction:.1f}".replace("-0.0", "0.0").replace("-", "−")


def ratio_text(value: float | None) -> str:
    """Return a ratio with two digits, also where it has no upper end or was not measured."""
    if value is None:
        return "unknown"
    return "∞" if math.isinf(value) else f"{value:.2f}"

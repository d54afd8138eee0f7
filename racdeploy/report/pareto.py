"""Pareto front of size, speed, accuracy and thinking length, and comparisons with the rivals.

A metric counts only if every arm has it: an arm whose speed was not measured cannot lose on speed.
Sizes within 2 % and speeds within 5 % are equal; accuracy and thinking length are equal if the
interval of the paired difference contains "no difference".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from racdeploy.report.tables import LENGTH_INTERVAL, LENGTH_RATIO, format_with_units, to_single_line
from racdeploy.results.answers import ArmSummary, RivalRow
from racdeploy.results.report import Report

_EQUAL_SIZE, _EQUAL_SPEED = 1.02, 1.05
_SIZE = "size ({:bytes}, pruned {:bytes})"
_GAIN = "accuracy ({0.gain:points} points, {0.gain_lower:points} to {0.gain_upper:points})"
_THINKING = f"thinking ({LENGTH_RATIO}, {LENGTH_INTERVAL})"
# -1: lower is better.
_SIGNS = {"size_bytes": -1, "tokens_per_s": 1, "accuracy": 1, "thinking_tokens_mean": -1}


def find_pareto_front(arms: Sequence[ArmSummary]) -> frozenset[str]:
    """Return the names of the non-dominated arms."""
    qualities: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for field, sign in _SIGNS.items():
        values = [getattr(arm, field) for arm in arms]
        if None not in values:
            for arm, value in zip(arms, values, strict=True):
                qualities[arm.name].append(sign * value)

    return find_non_dominated(qualities)


def find_non_dominated(qualities: Mapping[str, Sequence[float]]) -> frozenset[str]:
    """Return the names that no other name dominates; higher values are better.

    A name is dominated by another that is at least as good in all values and better in one.
    """
    names = set()
    for name, quality in qualities.items():
        is_dominated = []
        for other in qualities.values():
            pairs = zip(other, quality, strict=True)
            is_dominated.append(
                other != quality and all(value >= own_value for value, own_value in pairs)
            )
        if not any(is_dominated):
            names.add(name)
    return frozenset(names)


def describe_rivals(report: Report) -> list[str]:
    """Return one sentence for each rival and one for the Pareto front; empty without rivals."""
    pruned = report.find_arm("pruned")
    if pruned is None or not report.rivals:
        return []

    sentences = []
    for row in report.rivals:
        if rival := report.find_arm(row.name):
            sentences.append(_compare(rival, pruned, row))

    best = find_pareto_front(report.arms)
    names = [arm.name for arm in report.arms]
    on = ", ".join(name for name in names if name in best)
    off = ", ".join(name for name in names if name not in best)
    rest = f"; dominated: {off}" if off else ""
    sentences.append(f"Pareto front of size, speed, accuracy and thinking: {on}{rest}.")
    return [to_single_line(sentence) for sentence in sentences]


def _compare(rival: ArmSummary, pruned: ArmSummary, row: RivalRow) -> str:
    """Return a sentence with the metrics in which the rival, the pruned model or none is better."""
    metrics: dict[str, list[str]] = {rival.name: [], "pruned": [], "equal": []}

    for metric, rival_is_better, pruned_is_better in _judge(rival, pruned, row):
        better = "equal"
        if rival_is_better:
            better = rival.name
        elif pruned_is_better:
            better = "pruned"
        metrics[better].append(metric)

    equal = metrics.pop("equal")
    parts = [f"{name} is better in {_enumerate(each)}" for name, each in metrics.items() if each]
    if equal:
        parts.append(f"equal in {_enumerate(equal)}")
    return f"{rival.name} compared with pruned: {'; '.join(parts)}."


def _judge(
    rival: ArmSummary, pruned: ArmSummary, row: RivalRow
) -> Iterator[tuple[str, bool, bool]]:
    """Yield each metric of both models with its figures, and whether rival or pruned is better."""
    if rival.size_bytes and pruned.size_bytes:
        ratio = rival.size_bytes / pruned.size_bytes
        figures = format_with_units(_SIZE, rival.size_bytes, pruned.size_bytes)
        yield figures, ratio < 1 / _EQUAL_SIZE, ratio > _EQUAL_SIZE

    if rival.tokens_per_s and pruned.tokens_per_s:
        ratio = rival.tokens_per_s / pruned.tokens_per_s
        figures = f"speed ({ratio:.2f} times that of pruned)"
        yield figures, ratio > _EQUAL_SPEED, ratio < 1 / _EQUAL_SPEED

    yield format_with_units(_GAIN, row), row.gain_lower > 0, row.gain_upper < 0
    yield format_with_units(_THINKING, row), row.length_upper < 1, row.length_lower > 1


def _enumerate(items: Sequence[str]) -> str:
    *before, last = items
    return f"{', '.join(before)} and {last}" if before else last

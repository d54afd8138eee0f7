"""Who wins where: the Pareto front of size, speed, accuracy and thinking length, and each rival.

A quality counts only where every arm has it: an arm whose speed was not measured cannot lose on
speed. Sizes within 2 % and speeds within 5 % are even; accuracy and thinking length are even where
the interval of the paired difference contains "no difference".
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.report.model import ArmSummary, Report, RivalRow
from racdeploy.report.tables import plain, points, readable_bytes

_SIZE_EVEN, _SPEED_EVEN = 1.02, 1.05


def front(arms: Sequence[ArmSummary]) -> frozenset[str]:
    """Return the names of the arms that no other arm equals in everything and beats anywhere."""
    columns = (
        [_negate(arm.size_bytes) for arm in arms],
        [arm.tokens_per_s for arm in arms],
        [arm.accuracy for arm in arms],
        [_negate(arm.thinking_tokens_mean) for arm in arms],
    )
    measured = [[value for value in column if value is not None] for column in columns]
    rows = list(zip(*(column for column in measured if len(column) == len(arms)), strict=True))

    names = set()
    for arm, own in zip(arms, rows, strict=True):
        better = (row for row in rows if row != own)
        if not any(all(a >= b for a, b in zip(row, own, strict=True)) for row in better):
            names.add(arm.name)
    return frozenset(names)


def who_wins(report: Report) -> list[str]:
    """Return one sentence for each rival and one for the front; nothing where there is no rival."""
    by_name = {arm.name: arm for arm in report.arms}
    pruned = by_name.get("pruned")
    if pruned is None or not report.rivals:
        return []

    rows = [row for row in report.rivals if row.name in by_name]
    sentences = [_compare(by_name[row.name], pruned, row) for row in rows]

    best = front(report.arms)
    on = ", ".join(arm.name for arm in report.arms if arm.name in best)
    off = ", ".join(arm.name for arm in report.arms if arm.name not in best)
    rest = f"; beaten or equalled in everything: {off}" if off else ""
    sentences.append(f"On the front of size, speed, accuracy and thinking: {on}{rest}.")
    return [plain(sentence) for sentence in sentences]


def _compare(rival: ArmSummary, pruned: ArmSummary, row: RivalRow) -> str:
    wins: dict[str, list[str]] = {rival.name: [], "pruned": [], "even": []}

    if rival.size_bytes and pruned.size_bytes:
        ratio = rival.size_bytes / pruned.size_bytes
        sizes = f"{readable_bytes(rival.size_bytes)}, pruned {readable_bytes(pruned.size_bytes)}"
        winner = _winner(rival, ratio < 1 / _SIZE_EVEN, ratio > _SIZE_EVEN)
        wins[winner].append(f"size ({sizes})")

    if rival.tokens_per_s and pruned.tokens_per_s:
        ratio = rival.tokens_per_s / pruned.tokens_per_s
        winner = _winner(rival, 1 / ratio < 1 / _SPEED_EVEN, 1 / ratio > _SPEED_EVEN)
        wins[winner].append(f"speed ({ratio:.2f} times that of pruned)")

    winner = _winner(rival, row.gain_lower > 0, row.gain_upper < 0)
    interval = f"{points(row.gain_lower)} to {points(row.gain_upper)}"
    wins[winner].append(f"accuracy ({points(row.gain)} points, {interval})")

    winner = _winner(rival, row.length_upper < 1, row.length_lower > 1)
    interval = f"{row.length_lower:.2f} to {row.length_upper:.2f}"
    wins[winner].append(f"thinking ({row.length_ratio:.2f} times as long, {interval})")

    even = wins.pop("even")
    parts = [f"{name} wins on {_enumerate(what)}" for name, what in wins.items() if what]
    if even:
        parts.append(f"even on {_enumerate(even)}")
    return f"{rival.name} against pruned: {'; '.join(parts)}."


def _winner(rival: ArmSummary, wins: bool, loses: bool) -> str:
    if wins:
        return rival.name
    return "pruned" if loses else "even"


def _negate(value: float | None) -> float | None:
    """Return a quality of which less is better as one of which more is."""
    return None if value is None else -value


def _enumerate(items: Sequence[str]) -> str:
    *before, last = items
    return f"{', '.join(before)} and {last}" if before else last

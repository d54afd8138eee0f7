"""Who wins where: the Pareto front of size, speed, accuracy and thinking length, and a sentence for each rival.

A quality counts only where every arm has it: an arm whose speed was not measured cannot lose on speed. Sizes within
2 % and speeds within 5 % are even; accuracy and thinking length are even where the interval of the paired difference
holds "no difference".
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.report.model import ArmSummary, Report, RivalRow
from racdeploy.report.tables import plain, points, readable_bytes

_SIZE_EVEN, _SPEED_EVEN = 1.02, 1.05


def front(arms: Sequence[ArmSummary]) -> frozenset[str]:
    """Return the names of the arms that no other arm equals or beats in everything and beats in something."""
    columns: list[list[float | None]] = [
        [-arm.size_bytes if arm.size_bytes is not None else None for arm in arms],
        [arm.tokens_per_s for arm in arms],
        [arm.accuracy for arm in arms],
        [
            -arm.thinking_tokens_mean if arm.thinking_tokens_mean is not None else None
            for arm in arms
        ],
    ]
    measured = [[value for value in column if value is not None] for column in columns]
    compared = [column for column in measured if len(column) == len(arms)]
    rows = [[column[place] for column in compared] for place in range(len(arms))]
    return frozenset(
        arm.name
        for arm, own in zip(arms, rows, strict=True)
        if not any(
            other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in rows
        )
    )


def who_wins(report: Report) -> list[str]:
    """Return one sentence for each rival and one for the front; nothing where no rival was measured."""
    pruned = next((arm for arm in report.arms if arm.name == "pruned"), None)
    by_name = {arm.name: arm for arm in report.arms}
    if pruned is None or not report.rivals:
        return []
    sentences = [
        _sentence(by_name[row.name], pruned, row) for row in report.rivals if row.name in by_name
    ]
    best = front(report.arms)
    on = [arm.name for arm in report.arms if arm.name in best]
    off = [arm.name for arm in report.arms if arm.name not in best]
    ends = f"; beaten or equalled in everything: {', '.join(off)}" if off else ""
    return [
        plain(text)
        for text in (
            *sentences,
            f"On the front of size, speed, accuracy and thinking: {', '.join(on)}{ends}.",
        )
    ]


def _sentence(rival: ArmSummary, pruned: ArmSummary, row: RivalRow) -> str:
    wins: dict[str, list[str]] = {rival.name: [], "pruned": [], "even": []}
    for winner, what in _verdicts(rival, pruned, row):
        wins[winner].append(what)
    parts = [
        f"{name} wins on {_listed(what)}" for name, what in wins.items() if what and name != "even"
    ]
    if wins["even"]:
        parts.append(f"even on {_listed(wins['even'])}")
    text = f"{rival.name} against pruned: {'; '.join(parts)}."
    return text


def _verdicts(rival: ArmSummary, pruned: ArmSummary, row: RivalRow) -> list[tuple[str, str]]:
    """Return who wins and on what, with the figures."""
    found = []
    if rival.size_bytes and pruned.size_bytes:
        sizes = (
            f"size ({readable_bytes(rival.size_bytes)}, pruned {readable_bytes(pruned.size_bytes)})"
        )
        found.append(
            (_smaller(rival.name, rival.size_bytes / pruned.size_bytes, _SIZE_EVEN), sizes)
        )
    if rival.tokens_per_s and pruned.tokens_per_s:
        ratio = rival.tokens_per_s / pruned.tokens_per_s
        found.append(
            (
                _smaller(rival.name, 1 / ratio, _SPEED_EVEN),
                f"speed ({ratio:.2f} times that of pruned)",
            )
        )
    gain = f"accuracy ({points(row.gain)} points, {points(row.gain_lower)} to {points(row.gain_upper)})"
    found.append(
        (rival.name if row.gain_lower > 0 else "pruned" if row.gain_upper < 0 else "even", gain)
    )
    length = f"thinking ({row.length_ratio:.2f} times as long, {row.length_lower:.2f} to {row.length_upper:.2f})"
    found.append(
        (
            rival.name if row.length_upper < 1 else "pruned" if row.length_lower > 1 else "even",
            length,
        )
    )
    return found


def _smaller(rival: str, ratio: float, even: float) -> str:
    return rival if ratio < 1 / even else "pruned" if ratio > even else "even"


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))

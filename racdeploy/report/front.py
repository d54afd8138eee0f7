"""Who wins where: the Pareto front of size, speed, accuracy and thinking length, and each rival.

A quality counts only where every arm has it: an arm whose speed was not measured cannot lose on
speed. Sizes within 2 % and speeds within 5 % are even; accuracy and thinking length are even where
the interval of the paired difference contains "no difference".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from racdeploy.report.tables import LENGTH, LENGTH_INTERVAL, plain, say
from racdeploy.results.answers import ArmSummary, RivalRow
from racdeploy.results.report import Report

_SIZE_EVEN, _SPEED_EVEN = 1.02, 1.05
_SIZE = "size ({:bytes}, pruned {:bytes})"
_GAIN = "accuracy ({0.gain:points} points, {0.gain_lower:points} to {0.gain_upper:points})"
_THINKING = f"thinking ({LENGTH}, {LENGTH_INTERVAL})"
# -1: less is better.
_SIGNS = {"size_bytes": -1, "tokens_per_s": 1, "accuracy": 1, "thinking_tokens_mean": -1}


def front(arms: Sequence[ArmSummary]) -> frozenset[str]:
    """Return the names of the arms that no other arm equals in everything and beats anywhere."""
    qualities: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for field, sign in _SIGNS.items():
        values = [getattr(arm, field) for arm in arms]
        if None not in values:
            for arm, value in zip(arms, values, strict=True):
                qualities[arm.name].append(sign * value)

    return find_unbeaten(qualities)


def find_unbeaten(qualities: Mapping[str, Sequence[float]]) -> frozenset[str]:
    """Return the names whose qualities no others equal in everything and beat anywhere.

    Of each quality more is better.
    """
    names = set()
    for name, own in qualities.items():
        better = []
        for rival in qualities.values():
            pairs = zip(rival, own, strict=True)
            better.append(rival != own and all(theirs >= ours for theirs, ours in pairs))
        if not any(better):
            names.add(name)
    return frozenset(names)


def who_wins(report: Report) -> list[str]:
    """Return one sentence for each rival and one for the front; nothing where there is no rival."""
    pruned = report.arm("pruned")
    if pruned is None or not report.rivals:
        return []

    sentences = []
    for row in report.rivals:
        if rival := report.arm(row.name):
            sentences.append(_compare(rival, pruned, row))

    best = front(report.arms)
    names = [arm.name for arm in report.arms]
    on = ", ".join(name for name in names if name in best)
    off = ", ".join(name for name in names if name not in best)
    rest = f"; beaten or equalled in everything: {off}" if off else ""
    sentences.append(f"On the front of size, speed, accuracy and thinking: {on}{rest}.")
    return [plain(sentence) for sentence in sentences]


def _compare(rival: ArmSummary, pruned: ArmSummary, row: RivalRow) -> str:
    wins: dict[str, list[str]] = {rival.name: [], "pruned": [], "even": []}

    for what, rival_wins, pruned_wins in _judge(rival, pruned, row):
        winner = "even"
        if rival_wins:
            winner = rival.name
        elif pruned_wins:
            winner = "pruned"
        wins[winner].append(what)

    even = wins.pop("even")
    parts = [f"{name} wins on {_enumerate(what)}" for name, what in wins.items() if what]
    if even:
        parts.append(f"even on {_enumerate(even)}")
    return f"{rival.name} against pruned: {'; '.join(parts)}."


def _judge(
    rival: ArmSummary, pruned: ArmSummary, row: RivalRow
) -> Iterator[tuple[str, bool, bool]]:
    """Yield each quality that both have with its figures, and whether rival or pruned wins."""
    if rival.size_bytes and pruned.size_bytes:
        ratio = rival.size_bytes / pruned.size_bytes
        figures = say(_SIZE, rival.size_bytes, pruned.size_bytes)
        yield figures, ratio < 1 / _SIZE_EVEN, ratio > _SIZE_EVEN

    if rival.tokens_per_s and pruned.tokens_per_s:
        ratio = rival.tokens_per_s / pruned.tokens_per_s
        figures = f"speed ({ratio:.2f} times that of pruned)"
        yield figures, ratio > _SPEED_EVEN, ratio < 1 / _SPEED_EVEN

    yield say(_GAIN, row), row.gain_lower > 0, row.gain_upper < 0
    yield say(_THINKING, row), row.length_upper < 1, row.length_lower > 1


def _enumerate(items: Sequence[str]) -> str:
    *before, last = items
    return f"{', '.join(before)} and {last}" if before else last

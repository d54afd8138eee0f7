"""Judgement of a rung: where it is farther from the dense model than the file people download."""

from __future__ import annotations

from collections.abc import Iterator

from racdeploy.pipeline.divergence_stage import FileDivergence, Passages
from racdeploy.recipe import LadderLimits
from racdeploy.results.report import Report
from racdeploy.results.units import format_points
from racdeploy.verification.stats.excess import bound_mean_difference

NEGLIGIBLE_ANSWER_KL = 0.01
"""KL of a whole answer in nats that cannot be noticed: by Pinsker's inequality, sampled answers
differ in at most √(0.01 / 2) = 7 % of cases in any way at all, of which a loss is a part.
"""


def find_farther(
    limits: LadderLimits, own: FileDivergence, download: FileDivergence
) -> dict[str, float]:
    """Return the kinds of text on which a file is farther from the dense model than a download.

    It is farther where the upper bound of the difference of both KLs is above a share of the
    download's; not on traces where whole answers can hardly be told from the dense model's.

    Args:
        limits: of the ladder.
        own: distances of the file.
        download: distances of the file that people download.

    Returns:
        Kind → ratio of both KLs.
    """
    farther = {}
    own_answer = own.traces.kl * own.answer_tokens
    for kind, ours, theirs in pair_kinds(own, download):
        if kind == "traces" and own_answer <= NEGLIGIBLE_ANSWER_KL:
            continue
        allowed = limits.max_excess * theirs.kl
        bound = bound_mean_difference(theirs.kl_sums, ours.kl_sums, ours.tokens)
        if bound > allowed:
            farther[kind] = divide(ours.kl, theirs.kl)
    return farther


def pair_kinds(
    own: FileDivergence, download: FileDivergence
) -> Iterator[tuple[str, Passages, Passages]]:
    """Yield each kind of text that counts, with both files' distances on it."""
    yield "traces", own.traces, download.traces
    if own.knows_text:
        yield "text", own.text, download.text


def divide(own_kl: float, download_kl: float) -> float:
    """Return the ratio of two KLs; a download without loss has the smallest float."""
    return own_kl / max(download_kl, 1e-300)


def find_losses(report: Report, download: str) -> list[str]:
    """Return what the answers show to be lost; empty if they show nothing.

    A failed check is a loss. So is what dense is shown to do better, if the file that people
    download does it better too: a loss that this file shares is no reason for a larger one.

    Args:
        download: number format of the file that people download, if it was asked.
    """
    losses = [f"{check.name} failed" for check in report.checks if check.verdict == "fail"]
    compared = report.comparison
    rivals = {row.name: row for row in report.rivals}
    rival = rivals.get(f"dense {download}")
    if compared is None or rival is None:
        return losses

    dense_is_better = compared.drop_lower > 0
    download_is_better = rival.gain_lower > 0
    if dense_is_better and download_is_better:
        points = format_points(compared.drop_lower)
        losses.append(f"a loss of at least {points} points")

    shortest = compared.length_lower or 0.0
    thinks_longer = shortest > 1
    download_is_shorter = rival.length_upper < 1
    if thinks_longer and download_is_shorter:
        losses.append(f"thinking at least {shortest:.3f} times as long")

    return losses

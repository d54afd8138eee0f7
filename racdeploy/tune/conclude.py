"""The end of a search: the winner is built, and verified beside the best of the other kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from racdeploy import __version__
from racdeploy.errors import UsageError
from racdeploy.pipeline.bundling import check_replaceable
from racdeploy.pipeline.comparison import Rival
from racdeploy.report.files import read_records
from racdeploy.report.model import Record, Report
from racdeploy.report.tuning import Interval, Tuning
from racdeploy.report.tuning_files import write_tuning
from racdeploy.tune.asked import list_asked
from racdeploy.tune.entries import Entry
from racdeploy.tune.race import Marks
from racdeploy.tune.search import Search
from racdeploy.tune.verdict import write_verdict


def tune(search: Search, out: Path | None = None) -> tuple[Path, Report, Tuning]:
    """Search among counted candidates, and verify the winner.

    Returns the bundle, its report, and the search's.

    Raises:
        UsageError: no candidate keeps the wishes; the message names the nearest.
    """
    if out:
        check_replaceable(out)
    search.survey()
    search.compare()
    order = search.run_race()
    if not order:
        raise _refuse_inaccurate(search)

    winner, rival = order[0], find_rival(search.entries, order)
    beside = [_as_rival(rival)] if rival else []
    with search.clock.stage("verify"):
        folder, report = search.build(winner.choice.job).run(out, beside)
        for entry in filter(None, (winner, rival)):
            assert entry.exported
            entry.alone = search.predictor.measure(entry.exported.path)

    _count_answers(winner, rival, read_records(folder))
    tuning = _summarize(search, winner, rival, report, folder)
    write_tuning(folder, tuning)
    return folder, report, tuning


def find_rival(entries: Sequence[Entry], order: Sequence[Entry]) -> Entry | None:
    """Return the best of the other kind than the winner, dense or pruned; None if none was made.

    Those that may win come first, then the nearest to the dense model.
    """
    winner = order[0]
    others = [entry for entry in order if entry.choice.dense != winner.choice.dense]
    if others:
        return others[0]

    made = []
    for entry in entries:
        is_other = entry.choice.dense != winner.choice.dense
        if is_other and entry.exported and entry.keeps_limits:
            made.append(entry)

    return min(made, key=lambda entry: entry.quality, default=None)


def _as_rival(entry: Entry) -> Rival:
    assert entry.exported
    assert entry.model
    quant = entry.choice.recipe.export.quant
    return Rival(name_arm(entry), quant, entry.exported, entry.model.folder)


def name_arm(entry: Entry) -> str:
    """Return what the report of the winner calls a model beside it."""
    return f"dense, {entry.name}" if entry.choice.dense else entry.name


def _count_answers(winner: Entry, rival: Entry | None, records: Sequence[Record]) -> None:
    """Replace what both did in the race by what they did in the verification."""
    arms = {"pruned": winner}
    if rival:
        arms[name_arm(rival)] = rival

    for arm, entry in arms.items():
        own = [record for record in records if record.arm == arm]
        entry.marks = Marks.of(own)
        entry.reached = "verified"


def _summarize(
    search: Search, winner: Entry, rival: Entry | None, report: Report, folder: Path
) -> Tuning:
    recipe = search.job.recipe
    gain = _find_gain(rival, report)
    race = search.race
    return Tuning(
        racdeploy=__version__,
        created=datetime.now(UTC),
        model=recipe.model,
        target=recipe.target,
        tasks=tuple(search.job.tasks.evaluation),
        wishes=search.wishes,
        device=search.predictor.device_row,
        candidates=tuple(search.rows()),
        winner=winner.name,
        rival=rival.name if rival else "",
        reference=search.reference.name,
        verdict=write_verdict(winner, rival, gain, search.wishes, _find_confidence(report)),
        gain=gain,
        notes=tuple(search.notes),
        recipe=list_asked(recipe),
        tier=search.job.tier,
        seconds={stage: round(took, 1) for stage, took in search.clock.seconds.items()},
        tokens_asked=race.tokens_asked if race else 0,
        tokens_saved=race.tokens_saved if race else 0,
        bundle=folder.name,
    )


def _find_confidence(report: Report) -> float:
    return report.comparison.confidence if report.comparison else 0.90


def _find_gain(rival: Entry | None, report: Report) -> Interval | None:
    """Return the winner's accuracy over the rival's, with the interval over the same prompts."""
    for row in report.rivals:
        if rival and row.name == name_arm(rival):
            return Interval(value=-row.gain, lower=-row.gain_upper, upper=-row.gain_lower)
    return None


def _refuse_inaccurate(search: Search) -> UsageError:
    allowed = []
    for entry in search.entries:
        if entry.marks is not None and entry.keeps_limits:
            allowed.append(entry)

    best = max(allowed, key=lambda entry: entry.accuracy)
    right = best.accuracy

    reference = search.reference
    dense = reference.accuracy
    ratio = math.floor(100 * right / dense) / 100 if dense else 0.0

    wanted = search.job.recipe.tune.least_ratio
    return UsageError(
        f"no candidate keeps {wanted:.0%} of the accuracy of {reference.name}, {dense:.1%}; the "
        f"nearest is {best.name}, {right:.1%}",
        remedy=f"--min-accuracy-ratio {ratio:.2f}, or more room: --max-bytes, --max-memory",
    )

"""The end of a search: the winner is built, and verified beside the best of the other kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from racdeploy import __version__
from racdeploy.errors import UsageError
from racdeploy.files.toml import merge
from racdeploy.pipeline.bundling import check_replaceable
from racdeploy.pipeline.comparison import Rival
from racdeploy.processes.cores import available_cores
from racdeploy.recipe import Recipe
from racdeploy.report.files import read_records
from racdeploy.report.tables import readable_bytes
from racdeploy.report.tuning_files import write_tuning
from racdeploy.report.tuning_tables import describe_limits
from racdeploy.results.answers import Record
from racdeploy.results.report import Report
from racdeploy.results.tuning import Constraints, Interval, Tuning
from racdeploy.results.units import points
from racdeploy.tune.candidates import PLAIN, Choice
from racdeploy.tune.entries import Entry
from racdeploy.tune.race import Scores
from racdeploy.tune.search import Search
from racdeploy.tune.speed import measure_file
from racdeploy.verify.stats.costs import cost_per_success

_MAX_PROMPT = 256  # tokens of the prompts on which the winner is timed


def tune(search: Search, out: Path | None) -> tuple[Path, Report, Tuning]:
    """Search among counted candidates, and verify the winner.

    Returns the bundle, its report, and the search's.

    Raises:
        UsageError: no candidate keeps the limits; the message names the nearest.
    """
    if out:
        check_replaceable(out)
    search.measure()
    search.compare()
    order = search.run_race()
    if not order:
        raise _refuse_inaccurate(search)

    winner, rival = order[0], find_rival(search.entries, order)
    beside = [_as_rival(rival)] if rival else []
    with search.budget.stage("verify"):
        folder, report = search.build(winner.choice.job).run(out, beside)
        for entry in filter(None, (winner, rival)):
            _time_alone(search, entry)

    _count_answers(winner, rival, read_records(folder))
    tuning = _summarize(search, winner, rival, report, folder)
    write_tuning(folder, tuning)
    return folder, report, tuning


def find_rival(entries: Sequence[Entry], order: Sequence[Entry]) -> Entry | None:
    """Return the best of the other kind than the winner, dense or pruned; None if none was made.

    Those that may win come first, then the nearest to the dense model.
    """
    is_dense = order[0].choice.dense
    others = [entry for entry in order if entry.choice.dense != is_dense]
    if others:
        return others[0]
    made = []
    for entry in entries:
        if entry.choice.dense != is_dense and entry.exported and entry.keeps_limits:
            made.append(entry)
    return min(made, key=lambda entry: entry.distance, default=None)


def list_changed(choice: Choice) -> dict[str, Any]:
    """Return the recipe of a candidate by part, without what a bare build of its target takes."""
    own = choice.recipe
    bare = Recipe.combine(None, merge({"model": own.model, "target": own.target}, PLAIN))
    changed = _list_changed(own.model_dump(mode="json"), bare.model_dump(mode="json"), own)
    changed.pop("tune", None)
    return {"model": own.model, "target": own.target, **merge(choice.given, changed)}


def _list_changed(
    values: Mapping[str, Any], usual: Mapping[str, Any], model: BaseModel
) -> dict[str, Any]:
    """Return the values that are not as usual; tables of a user's own are kept whole."""
    changed = {}
    for key, value in values.items():
        part = getattr(model, key)
        if value != usual[key]:
            is_part = isinstance(part, BaseModel)
            changed[key] = _list_changed(value, usual[key], part) if is_part else value
    return changed


def _as_rival(entry: Entry) -> Rival:
    assert entry.exported
    assert entry.model
    quant = entry.choice.recipe.export.quant
    return Rival(_name_arm(entry), quant, entry.exported, entry.model.folder)


def _name_arm(entry: Entry) -> str:
    """Return what the report of the winner calls a model beside it."""
    return f"dense, {entry.name}" if entry.choice.dense else entry.name


def _time_alone(search: Search, entry: Entry) -> None:
    """Decode with an artifact alone, where the device is this machine."""
    if search.target.device is None:
        assert entry.exported
        prompt = min(_MAX_PROMPT, search.job.recipe.verify.context_tokens // 4)
        threads = search.threads or available_cores()
        entry.alone = measure_file(entry.exported.path, threads, search.job.backend, prompt)


def _count_answers(winner: Entry, rival: Entry | None, records: Sequence[Record]) -> None:
    """Replace what both did in the race by what they did in the verification."""
    arms = {"pruned": winner}
    if rival:
        arms[_name_arm(rival)] = rival
    for arm, entry in arms.items():
        entry.scores = Scores.of([record for record in records if record.arm == arm])
        entry.reached = "verified"


def _summarize(
    search: Search, winner: Entry, rival: Entry | None, report: Report, folder: Path
) -> Tuning:
    recipe = search.job.recipe
    gain = _find_gain(rival, report)
    confidence = 0.90
    if report.comparison:
        confidence = report.comparison.confidence
    race = search.race

    return Tuning(
        racdeploy=__version__,
        created=datetime.now(UTC),
        model=recipe.model,
        target=recipe.target,
        tasks=tuple(search.job.tasks.evaluation),
        constraints=search.limits,
        device=search.device_row,
        candidates=tuple(search.rows()),
        winner=winner.name,
        rival=rival.name if rival else "",
        reference=search.reference.name,
        verdict=write_verdict(winner, rival, gain, search.limits, confidence),
        gain=gain,
        notes=tuple(search.notes),
        recipe=list_changed(winner.choice),
        seconds={stage: round(took, 1) for stage, took in search.budget.seconds.items()},
        tokens_asked=race.tokens_asked if race else 0,
        tokens_saved=race.tokens_saved if race else 0,
        bundle=folder.name,
    )


def _find_gain(rival: Entry | None, report: Report) -> Interval | None:
    """Return the winner's accuracy over the rival's, with the interval over the same prompts."""
    for row in report.rivals:
        if rival and row.name == _name_arm(rival):
            return Interval(value=-row.gain, lower=-row.gain_upper, upper=-row.gain_lower)
    return None


def write_verdict(
    winner: Entry,
    rival: Entry | None,
    gain: Interval | None,
    limits: Constraints,
    confidence: float = 0.90,
) -> str:
    """Return who wins over whom, in accuracy, size and speed.

    Args:
        gain: of the winner's accuracy over the rival's, with its interval of that confidence.
    """
    asked = describe_limits(limits)
    kind = "plain dense weights" if winner.choice.dense else "a pruned model"
    first = f"Asked for {asked}: {kind} won: {winner.name}, {_describe(winner)}."
    if rival is None or gain is None:
        if winner.choice.dense or rival:
            return first
        return f"{first} No dense model made keeps the limits."

    more, fewer = points(gain.value), points(-gain.value)
    ends = f"{points(gain.lower)} to {points(gain.upper)} points"
    interval = f"{confidence:.0%} interval {ends}"
    compared = f"in accuracy the two are even ({more} points, {interval})"
    if gain.lower > 0:
        compared = f"{winner.name} answers {more} points more ({interval})"
    if gain.upper < 0:
        compared = f"{winner.name} answers {fewer} points fewer ({interval})"

    other = "dense" if rival.choice.dense else "pruned"
    return f"{first} The best {other} rival, {rival.name}, has {_describe(rival)}; {compared}."


def _describe(entry: Entry) -> str:
    """Return accuracy, size, speed and what a right answer costs."""
    scores = entry.scores
    assert scores is not None, "both were verified"

    cost = cost_per_success(scores.tokens_N * entry.cost.token_s, scores.right_N)
    words = [
        f"{entry.accuracy:.1%} of {len(scores)} prompts right",
        readable_bytes(entry.size_bytes),
        f"{entry.cost.tokens_per_s:,.0f} tokens/s predicted",
        f"{cost.ratio:.3g} s a right answer",
    ]
    return ", ".join(words)


def _refuse_inaccurate(search: Search) -> UsageError:
    allowed = []
    for entry in search.entries:
        if entry.scores is not None and entry.keeps_limits:
            allowed.append(entry)
    best = max(allowed, key=lambda each: each.accuracy)

    reference = search.reference
    dense = reference.accuracy
    ratio = 0.0
    if dense:
        ratio = math.floor(100 * best.accuracy / dense) / 100
    return UsageError(
        "no-candidate-accurate",
        f"no candidate keeps {search.job.recipe.tune.least_ratio:.0%} of the accuracy of "
        f"{reference.name}, {dense:.1%}; the nearest is {best.name}, {best.accuracy:.1%}",
        remedy=f"--min-accuracy-ratio {ratio:.2f}, or more room: --max-bytes, --max-memory",
    )

"""End of a search: build the winner, and verify it beside its rival of the other kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from racdeploy import __version__
from racdeploy.engines.decoding_speed import measure_file
from racdeploy.errors import UsageError
from racdeploy.pipeline.bundling import check_replaceable
from racdeploy.pipeline.evaluation import ExportedArm
from racdeploy.processes.cores import available_cores
from racdeploy.report.files import read_records
from racdeploy.report.tables import format_with_units
from racdeploy.report.tuning_files import write_tuning
from racdeploy.report.tuning_tables import describe_limits
from racdeploy.results.report import Report
from racdeploy.results.tuning import Constraints, Estimate, Tuning
from racdeploy.results.units import format_confidence, format_points
from racdeploy.tuning.entries import Entry
from racdeploy.tuning.race import Scores
from racdeploy.tuning.search import Search

_FIGURES = (
    "{0.accuracy.value:.1%} of {0.prompts} prompts correct, {0.size_bytes:bytes}, "
    "{0.tokens_per_s:,.0f} tokens/s predicted, "
    "{0.seconds_per_correct.value:.3g} s per correct answer"
)
_MAX_PROMPT_TOKENS = 256  # in the speed measurement of the winner


def tune(search: Search, out: Path | None) -> tuple[Path, Report, Tuning]:
    """Run a planned search, and build and verify its winner.

    Args:
        search: after :meth:`Search.plan <racdeploy.tuning.search.Search.plan>`.
        out: folder of the bundle; None for one in the work folder.

    Returns:
        The bundle's folder, its report, and the result of the search.

    Raises:
        UsageError: no candidate meets the limits; the message names the nearest.
    """
    if out:
        check_replaceable(out)
    search.measure()
    search.compare()
    order = search.run_race()
    if not order:
        raise _refuse_inaccurate(search)

    winner = order[0]
    rival = find_rival(search.entries, order)
    rivals = [_as_rival(rival)] if rival else []
    with search.budget.stage("verify"):
        folder, report = search.build(winner.spec.job).run(out, rivals)
        for entry in filter(None, (winner, rival)):
            _time_alone(search, entry)

    # Replace the scores of the race by those of the verification.
    arms = {"pruned": winner}
    if rival:
        arms[_name_arm(rival)] = rival
    records = read_records(folder)
    for arm, entry in arms.items():
        entry.scores = Scores.from_records([record for record in records if record.arm == arm])
        entry.reached = "verified"

    tuning = _summarize(search, winner, rival, report=report, bundle=folder.name)
    write_tuning(folder, tuning)
    return folder, report, tuning


def find_rival(entries: Sequence[Entry], order: Sequence[Entry]) -> Entry | None:
    """Return the winner's rival: the best dense model if it is pruned, and the reverse.

    Candidates of the race come first, in their ``order``; else the one nearest to the dense model.
    None if none was made.
    """
    is_dense = order[0].spec.dense
    opponents = [entry for entry in order if entry.spec.dense != is_dense]
    if opponents:
        return opponents[0]
    made = [
        entry
        for entry in entries
        if entry.spec.dense != is_dense and entry.exported and entry.meets_limits
    ]
    return min(made, key=lambda entry: entry.distance, default=None)


def _as_rival(entry: Entry) -> ExportedArm:
    assert entry.exported
    assert entry.model
    quant = entry.spec.recipe.export.quant
    return ExportedArm(_name_arm(entry), quant, entry.exported, entry.model.folder)


def _name_arm(entry: Entry) -> str:
    """Return the name of a model in the winner's report."""
    return f"dense, {entry.name}" if entry.spec.dense else entry.name


def _time_alone(search: Search, entry: Entry) -> None:
    """Measure single-sequence decoding, if the device is this machine."""
    if search.target.device is None:
        assert entry.exported
        prompt_tokens = min(_MAX_PROMPT_TOKENS, search.job.verification.context_tokens // 4)
        threads = search.threads or available_cores()
        entry.decode_sample = measure_file(
            entry.exported.path, threads, search.job.backend, prompt_tokens
        )


def _summarize(
    search: Search, winner: Entry, rival: Entry | None, *, report: Report, bundle: str
) -> Tuning:
    recipe = search.job.recipe
    gain = _find_gain(rival, report)
    assert report.comparison
    verdict = write_verdict(
        winner, rival, gain, search.limits, confidence=report.comparison.confidence
    )

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
        verdict=verdict,
        gain=gain,
        notes=tuple(search.notes),
        recipe=winner.spec.recipe.model_dump(mode="json", exclude={"tune"}),
        seconds={stage: round(took, 1) for stage, took in search.budget.seconds.items()},
        bundle=bundle,
    )


def _find_gain(rival: Entry | None, report: Report) -> Estimate | None:
    """Return the paired accuracy difference, winner minus rival, with its interval."""
    for row in report.rivals:
        if rival and row.name == _name_arm(rival):
            # The report has the rival's gain over the winner.
            return Estimate(value=-row.gain, lower=-row.gain_upper, upper=-row.gain_lower)
    return None


def write_verdict(
    winner: Entry,
    rival: Entry | None,
    gain: Estimate | None,
    limits: Constraints,
    confidence: float,
) -> str:
    """Return the verdict: the winner and its rival in accuracy, size and speed.

    Args:
        gain: paired accuracy difference, winner minus rival, with its interval.
        confidence: of that interval.
    """
    constraints = describe_limits(limits)
    kind = "plain dense weights" if winner.spec.dense else "a pruned model"
    first = f"Asked for {constraints}: {kind} won: {winner.name}, {_describe(winner)}."
    if rival is None or gain is None:
        if winner.spec.dense or rival:
            return first
        return f"{first} No dense model that was made meets the limits."

    more, fewer = format_points(gain.value), format_points(-gain.value)
    ends = f"{format_points(gain.lower)} to {format_points(gain.upper)} points"
    interval = f"{format_confidence(confidence)} interval {ends}"
    compared = f"in accuracy the two are even ({more} points, {interval})"
    if gain.lower > 0:
        compared = f"{winner.name} answers {more} points more ({interval})"
    if gain.upper < 0:
        compared = f"{winner.name} answers {fewer} points fewer ({interval})"

    other = "dense" if rival.spec.dense else "pruned"
    return f"{first} The best {other} rival, {rival.name}, has {_describe(rival)}; {compared}."


def _describe(entry: Entry) -> str:
    """Return accuracy, size, speed and seconds per correct answer, as text."""
    return format_with_units(_FIGURES, entry.as_row())


def _refuse_inaccurate(search: Search) -> UsageError:
    allowed = [each for each in search.entries if each.scores is not None and each.meets_limits]
    best = max(allowed, key=lambda each: each.accuracy)

    reference = search.reference
    dense = reference.accuracy
    ratio = 0.0
    if dense:  # rounded down, so that the remedy is met
        ratio = math.floor(100 * best.accuracy / dense) / 100
    return UsageError(
        "no-candidate-accurate",
        f"no candidate has {search.job.recipe.tune.effective_min_accuracy_ratio:.0%} of "
        f"{reference.name}'s accuracy, {dense:.1%}; the nearest: {best.name}, {best.accuracy:.1%}",
        remedy=f"--min-accuracy-ratio {ratio:.2f}, or a larger --max-bytes or --max-memory",
    )

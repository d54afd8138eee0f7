"""The search: cheap questions about all candidates first, dear ones about the few that are left.

Bytes, memory and speed are predicted for all, and errors by one survey of the dense model. Those
that promise most are made, and compared with the dense model on held-out traces; the best of these
race on prompts; the winner is verified beside the best of the other kind, on prompts that nobody
has seen. Every stage is kept in the work folder: a search that is run again goes on where it ended.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from racdeploy.decoding.engine import EngineSettings, Progress
from racdeploy.engines import open_engine
from racdeploy.errors import UsageError
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.report.tuning import Candidate, Wishes
from racdeploy.tasks import Problem
from racdeploy.traces.trace import Trace
from racdeploy.tune.candidates import Choice, propose
from racdeploy.tune.clock import Clock
from racdeploy.tune.divergence import DenseLogits
from racdeploy.tune.entries import Entry, find_front
from racdeploy.tune.predictor import Predictor, find_nearest
from racdeploy.tune.race import Aim, Marks, Race
from racdeploy.tune.strata import order_entries
from racdeploy.tune.surveyor import Surveyor

_LATE = "the time for comparing was over"
Show = Callable[[Sequence[Candidate]], None]
"""Is told how all candidates stand, whenever one has come further."""

_LEAST_WALKS = 4  # models that are pruned, however short the time
MOST_RACED = 12
_LEAST_TRACES = 16  # on which divergences are measured
_SPARE = 1.2  # prompts that are drawn for one: some may be among those of the verification
_MOST_TIMES = 8.0  # the nearest's divergence: who is farther does not race for accuracy
_LEAST_KL = 1e-4  # nats: below it, nobody answers worse


@dataclass
class Search:
    """A search for the best model of a job's target.

    Args:
        work: where stages are kept; 0 ``threads`` are every core.
        scratch: a folder for what lasts as long as the search.
        show: is told how candidates stand.
        left_out: why candidates cannot be, by name.
    """

    job: Job
    work: Path
    scratch: Path
    threads: int = 0
    progress: Progress | None = None
    show: Show | None = None
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    race: Race | None = None

    def __post_init__(self) -> None:
        self.clock = Clock(self.job.recipe.tune.budget_s)

    @cached_property
    def wishes(self) -> Wishes:
        """What was asked for; without a limit of memory, the target's."""
        tune = self.job.recipe.tune
        return Wishes(
            objective=tune.objective,
            max_bytes=tune.max_bytes or None,
            max_memory_bytes=tune.max_memory_bytes or self.predictor.target.memory_limit_bytes,
            min_tokens_per_s=tune.min_tokens_per_s or None,
            min_accuracy_ratio=tune.least_ratio or None,
            budget_s=tune.budget_s,
        )

    @cached_property
    def predictor(self) -> Predictor:
        """What predicts for the candidates of this search."""
        return Predictor(
            self.job,
            self.work,
            self.scratch,
            self.threads,
            self.progress,
        )

    def count(self) -> None:
        """Predict what every candidate takes; refuse wishes that none of them keeps."""
        with self.clock.stage("count"):
            proposals = propose(self.job)
            self.left_out |= proposals.left_out
            for choice in proposals.choices:
                self._enter(choice)

        self._refuse_impossible()
        self.notes += filter(None, [self.predictor.note])
        self._tell()

    def _enter(self, choice: Choice) -> None:
        try:
            entry = Entry(choice, self.predictor.predict(choice))
        except UsageError as error:
            self.left_out[choice.name] = error.message
            return

        twin = self.predictor.find_twin(choice)
        if twin:
            entry.leave(f"the same file as {twin}")
        entry.judge(self.wishes)
        self.entries.append(entry)

    def survey(self) -> None:
        """Predict how much every candidate changes, and mix formats for the bytes there are."""
        with self.clock.stage("survey"):
            surveyor = Surveyor(self.build(self.job), self.predictor)
            calibration, _ = self._traces
            surveyed = surveyor.survey(self._alive, calibration)
            for choice in surveyor.propose_mixes(surveyed, self.wishes, self.entries):
                self._enter(choice)

            for entry in self._alive:
                error = surveyor.predict_error(entry.choice, surveyed)
                entry.reached = "surveyed"
                if math.isinf(error):
                    entry.leave("its number format cannot hold the weights of a linear")
                else:
                    entry.error = error

        self._tell()

    def compare(self) -> None:
        """Make the most promising ones, and see how far they are from the dense model."""
        ordered = order_entries(self._alive, self.wishes.objective)
        kept = tempfile.TemporaryDirectory(dir=self.scratch)
        with self.clock.stage("compare"), kept as folder:
            logits = self._remember_logits(Path(folder))
            walked: set[str] = set()
            longest_s = {True: 0.0, False: 0.0}  # by whether the weights were there

            while ordered:
                entry = _take_next(ordered, walked)
                walk = entry.choice.walk
                is_known = walk in walked
                is_late = self.clock.left_s("compare") < longest_s[is_known]
                if is_late and (is_known or len(walked) >= _LEAST_WALKS):
                    entry.leave(_LATE)
                    continue

                began = self.clock.elapsed_s
                try:
                    self._make(entry)
                except UsageError as error:
                    entry.leave(error.message)
                    continue

                entry.judge(self.wishes)
                self._compare(entry, logits)

                walked.add(walk)
                took_s = self.clock.elapsed_s - began
                longest_s[is_known] = max(longest_s[is_known], took_s)
                self._tell()

        late = [entry for entry in self.entries if entry.why == _LATE]
        if late:
            self.notes.append(
                f"{len(late)} candidates were not tried, for want of time: a longer --budget would"
            )

    def _make(self, entry: Entry) -> None:
        """Prune and export a candidate, or find it made."""
        build = self.build(entry.choice.job)
        entry.model = build.prune()
        folder = entry.model.folder
        entry.exported = build.export(folder, name_artifact(build.job))

    def _compare(self, entry: Entry, logits: DenseLogits) -> None:
        assert entry.model
        assert entry.exported
        job = entry.choice.job
        path = entry.exported.path
        exact = self._settings(parallel=1, cache_dtype="f32")

        old_ids = job.renumbering(entry.model.folder)
        found = logits.compare(
            lambda: closing(open_engine(job.backend, path, exact)),
            old_ids,
        )
        entry.reached = "compared"
        if math.isnan(found.kl_nats):
            return  # every trace has a token that is gone

        entry.kl_nats = max(0.0, found.kl_nats)
        entry.top1 = found.top1

    def run_race(self) -> list[Entry]:
        """Let the best ones answer the same prompts; return those that may win, the best first."""
        raced = self._choose_runners()
        reference = self.reference
        by_name = {entry.name: entry for entry in (*raced, reference)}

        def ask(name: str, count: int) -> Marks:
            entry = by_name[name]
            entry.marks = self._answer(entry, self.prompts[:count])
            self._report_race(count)
            self._tell()
            return entry.marks

        tune = self.job.recipe.tune
        aim = Aim(self.wishes.objective, reference.name, tune.least_ratio)
        runners = [entry.as_runner() for entry in raced]
        self.race = Race(
            runners,
            aim,
            ask,
            len(self.prompts),
            may_go_on=self._may_race,
        )

        with self.clock.stage("race"):
            order = self.race.run()
        for entry in raced:
            entry.raced = entry.marks
        _refuse_unanswered(raced)

        for entry in raced:
            entry.reached = "raced"
            entry.leave(self.race.stopped.get(entry.name, ""))
            if entry.name not in order:
                entry.leave(f"too little of {reference.name}'s accuracy on the same prompts")

        return [by_name[name] for name in order]

    def _report_race(self, count: int) -> None:
        if self.progress:
            self.progress("race", count, len(self.prompts))

    def _may_race(self) -> bool:
        return self.clock.left_s("race") > 0

    def _choose_runners(self) -> list[Entry]:
        """Return who races: the nearest to the dense model, one of each kind at least."""
        compared = sorted(
            (entry for entry in self._alive if entry.reached == "compared"),
            key=lambda entry: entry.quality,
        )
        if not compared:
            self._refuse_measured()

        # Among its own kind: the best dense model is a rival although a pruned one beats it.
        front: frozenset[str] = frozenset()
        for is_dense in (True, False):
            front |= find_front(each for each in compared if each.choice.dense == is_dense)
        first = {entry.choice.dense: entry.name for entry in reversed(compared)}
        on_front = [entry.name for entry in compared if entry.name in front]
        spaced = _space_out(on_front)
        nearest = max(compared[0].quality, _LEAST_KL)
        by_accuracy = self.wishes.objective == "accuracy"

        chosen: list[Entry] = []
        for entry in compared:
            times = entry.quality / nearest
            if entry.name in first.values():
                chosen.append(entry)
            elif entry.name not in front:
                entry.leave("another of its kind is as small, as fast and as near to the dense one")
            elif by_accuracy and times > _MOST_TIMES:
                entry.leave(f"{times:,.0f} times as far from the dense model as the nearest")
            elif by_accuracy and len(chosen) >= MOST_RACED:
                entry.leave(f"{MOST_RACED} others are nearer to the dense model")
            elif not by_accuracy and entry.name not in spaced:
                entry.leave(f"{MOST_RACED} others are spread over the front")
            else:
                chosen.append(entry)

        return chosen

    @cached_property
    def reference(self) -> Entry:
        """The dense model in its widest format, whether or not it keeps the limits."""
        dense = [entry for entry in self.entries if entry.choice.kind == "dense"]
        widest = max(dense, key=lambda entry: entry.takes.size_bytes)
        if widest.exported is None:
            self._make(widest)
        return widest

    @cached_property
    def prompts(self) -> list[Problem]:
        """The race's prompts: others than those of the verification."""
        recipe = self.job.recipe
        wanted = recipe.tune.prompts
        later = self.job.problems("evaluation")
        asked_later = {problem.question for problem in later}

        seed = recipe.tune.seed
        if seed == recipe.verify.seed:
            seed += 1
        count = round(_SPARE * (wanted + len(later)))

        fresh = []
        for problem in self.job.tasks.draw("evaluation", seed, count):
            if problem.question not in asked_later:
                fresh.append(problem)

        if len(fresh) < wanted:
            self.notes.append(
                f"the tasks have {len(fresh)} prompts beside those of the verification, so the "
                "race asked calibration prompts, too"
            )
            fresh += self.job.problems("calibration")

        return fresh[:wanted]

    def _answer(self, entry: Entry, problems: Sequence[Problem]) -> Marks:
        assert entry.model
        assert entry.exported
        job = entry.choice.job
        answers = self.build(job).evaluation.answer(
            entry.exported,
            entry.name,
            self._settings(),
            entry.model.folder,
            problems=problems,
        )
        return Marks.of(answers.records)

    def build(self, job: Job) -> Build:
        """Return the build of a job in the search's work folder."""
        return Build(job, self.work, self.threads, self.progress)

    def rows(self) -> list[Candidate]:
        """Return all candidates as the report has them."""
        front = find_front(_list_alike(self.entries))
        return [entry.as_row(entry.name in front) for entry in self.entries]

    def _tell(self) -> None:
        if self.show:
            self.show(self.rows())

    @property
    def _alive(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_in]

    def _settings(self, **changes: object) -> EngineSettings:
        verify = self.job.recipe.verify
        settings = EngineSettings(verify.context_tokens, verify.parallel, self.threads)
        return replace(settings, **changes)  # type: ignore[arg-type]

    @cached_property
    def _traces(self) -> tuple[list[Trace], list[Trace]]:
        """Traces of the dense model that calibrate, and some that are held out."""
        build = self.build(self.job)
        _, traces = build.traces()
        calibration, held_out, _ = build.prune_stage.select(traces)
        if not held_out:
            raise UsageError(
                f"none of {len(traces)} traces is held out, so candidates cannot be compared",
                remedy="raise --trace-prompts, or calibration.held_out_share",
            )
        return calibration, held_out

    def _remember_logits(self, folder: Path) -> DenseLogits:
        _, held_out = self._traces
        exact = self._settings(parallel=1, cache_dtype="f32")
        model = self.job.model.folder

        traces = [(trace.prompt_ids, trace.completion_ids) for trace in held_out]
        most = max(_LEAST_TRACES, self.job.recipe.verify.logit_traces)
        return DenseLogits(
            lambda: closing(open_engine("transformers", model, exact)),
            traces[:most],
            folder,
        )

    def _refuse_impossible(self) -> None:
        """Say what is possible where no candidate keeps the limits."""
        if self._alive:
            return
        nearest, what = find_nearest(self.entries, self.wishes)
        raise UsageError(
            f"none of {len(self.entries)} candidates keeps the limits; the nearest is "
            f"{nearest.name}: {nearest.why}",
            remedy=what,
        )

    def _refuse_measured(self) -> None:
        made = [entry for entry in self.entries if entry.exported]
        nearest = min(made, key=lambda entry: entry.size_bytes)
        raise UsageError(
            f"no candidate that was made keeps the limits; the nearest is {nearest.name}: "
            f"{nearest.why}",
            remedy=f"--max-bytes {nearest.size_bytes}, or a longer --budget to try more",
        )


def _take_next(ordered: list[Entry], walked: Collection[str]) -> Entry:
    """Take the next candidate whose weights are there already, or else the next of all."""
    for place, entry in enumerate(ordered):
        if entry.choice.walk in walked:
            return ordered.pop(place)
    return ordered.pop(0)


def _space_out(names: Sequence[str]) -> set[str]:
    """Return at most MOST_RACED of some names, as evenly spaced as they can be."""
    count = len(names)
    if count <= MOST_RACED:
        return set(names)

    kept = set()
    step = (count - 1) / (MOST_RACED - 1)
    for number in range(MOST_RACED):
        place = round(number * step)
        kept.add(names[place])
    return kept


def _list_alike(entries: Sequence[Entry]) -> list[Entry]:
    """Return those that keep the limits and answered as many prompts of the race as any."""
    raced = [entry for entry in entries if entry.raced is not None and entry.keeps_limits]
    most = max((len(entry.raced or ()) for entry in raced), default=0)
    return [entry for entry in raced if len(entry.raced or ()) == most]


def _refuse_unanswered(raced: Sequence[Entry]) -> None:
    """Refuse a race in which nobody was right: nothing can be said of anybody."""
    if any(entry.marks is not None and entry.marks.right_N.any() for entry in raced):
        return
    raise UsageError(
        f"none of {len(raced)} candidates answers a single prompt of the race right",
        remedy="ask what the model can answer: --task NAME; or raise verify.max_new_tokens",
    )

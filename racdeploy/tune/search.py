"""The search: cheap questions about all candidates first, dear ones about the few that are left.

Sizes are counted for all, speed is predicted from the device's table. The most promising of each
kind are made, and compared with the dense model on held-out traces; the best of these race on
prompts. Every stage is kept in the work folder: a search that is run again resumes where it ended.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from racdeploy import quant
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Progress
from racdeploy.errors import UsageError
from racdeploy.files.stages import Stage
from racdeploy.packing import list_stored
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.forecast import count_active_weights
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.pipeline.workplace import Workplace
from racdeploy.results.tuning import Candidate, Constraints, DeviceRow
from racdeploy.targets import Target
from racdeploy.tasks import Problem
from racdeploy.traces.trace import Trace, TraceSet
from racdeploy.tune.budget import Budget, check_held_out, estimate_least
from racdeploy.tune.candidates import MAX_BITS, Choice, propose
from racdeploy.tune.divergence import DenseLogits
from racdeploy.tune.entries import Entry, find_front, find_nearest, order_entries
from racdeploy.tune.fill import propose_mix
from racdeploy.tune.predict import Predictor
from racdeploy.tune.race import Race, Scores
from racdeploy.tune.speed import ENGINE, Workload, find_device, look_up_device, predict_token_s
from racdeploy.verify.answers import Opener

MAX_MADE, MAX_RACED = 12, 6
_LATE = "the time for comparing was over"
_LEAST_TRACES = 16  # on which divergences are measured
_SPARE_PROMPTS = 1.2  # drawn for one: some may be among those of the verification
_MAX_TIMES = 8.0  # the nearest's divergence: whoever is farther does not answer best
_LEAST_KL = 1e-4  # nats: below it, nobody answers worse


@dataclass
class Search:
    """A search for the best model of a job's target.

    Args:
        work: where stages are kept; 0 ``threads`` are every core.
        scratch: a folder for what lasts as long as the search.
        show: gets a candidate whenever it has come further.
        left_out: why candidates cannot be, by name.
    """

    job: Job
    work: Path
    scratch: Path
    threads: int
    progress: Progress | None = None
    show: Callable[[Candidate], None] | None = None
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    race: Race | None = None

    def __post_init__(self) -> None:
        self.budget = Budget(self.job.recipe.tune.budget_s)
        self._here = look_up_device(self._place, self._workload, self.job.backend)
        self._predictor = Predictor(self.scratch, self.target.device or self._here)

    @cached_property
    def target(self) -> Target:
        """Where the models will run."""
        return Target.read(self.job.recipe.target)

    @property
    def measures(self) -> bool:
        """Whether the device is this machine, and has yet to be measured."""
        is_here = self.target.device is None and self.job.backend == ENGINE
        return is_here and not self._predictor.device.measured

    @cached_property
    def limits(self) -> Constraints:
        """What was asked for; without a limit of memory, the target's."""
        tune = self.job.recipe.tune
        return Constraints(
            objective=tune.objective,
            max_bytes=tune.max_bytes or None,
            max_memory_bytes=tune.max_memory_bytes or self.target.memory_limit_bytes,
            min_tokens_per_s=tune.min_tokens_per_s or None,
            min_accuracy_ratio=tune.least_ratio or None,
            budget_s=tune.budget_s,
        )

    def plan(self) -> None:
        """Count what every candidate takes, and what the search takes at least; measure nothing.

        Raises:
            UsageError: no candidate keeps the limits, traces or time are too few; it says how many.
        """
        choices, self.left_out = propose(self.job)
        for choice in choices:
            self._enter(choice)

        if self.limits.max_bytes:
            self._mix(self.limits.max_bytes)
        self._refuse_impossible()

        stage = Stage.at(self.work, "traces", self._build.trace_stage.inputs(self.job.checkpoint))
        traces = TraceSet(stage.folder).read() if stage.finished else []
        if not traces:
            check_held_out(self.job)

        read_bytes = self._predictor.size(self.reference.choice).read_bytes
        token_s = predict_token_s(self._here, read_bytes)
        self.budget.expected_s = estimate_least(
            self.job, token_s, self._here.cores, traces, measures=self.measures
        )
        self.budget.check()

    def _enter(self, choice: Choice) -> None:
        try:
            entry = Entry(choice, self._predictor.predict(choice))
        except UsageError as error:
            self.left_out[choice.name] = error.message
            return

        if twin := self._predictor.find_twin(choice):
            entry.reject(f"the same file as {twin}")
        entry.check(self._checked)
        self.entries.append(entry)

    def _mix(self, max_bytes: int) -> None:
        """Let the widest candidate of each kind use the bytes that are left."""
        widest: dict[str, Entry] = {}
        for entry in sorted(self._active, key=lambda each: each.size_bytes):
            widest[entry.choice.kind] = entry

        for entry in widest.values():
            size = self._predictor.size(entry.choice)
            if choice := propose_mix(entry.choice, size, max_bytes):
                self._enter(choice)

    def measure(self) -> None:
        """Measure this machine where it is the device, and reject what is too slow."""
        with self.budget.stage("measure"):
            if self.measures:
                place = replace(self._place, progress=self.report)
                self._predictor.device = find_device(place, self.scratch, self._workload)

        for entry in self.entries:
            entry.cost = self._predictor.predict(entry.choice)
            entry.check(self._checked)
            self._tell(entry)
        self._refuse_impossible()

    def compare(self) -> None:
        """Make the most promising ones, and measure how far they are from the dense model."""
        with self.budget.stage("traces"):
            _ = self._traces  # which collects them
        self.budget.learn("traces", self.budget.seconds["traces"])

        ordered = order_entries(self._active, self.limits.objective)
        with (
            tempfile.TemporaryDirectory(dir=self.scratch) as folder,
            self.budget.stage("compare"),
        ):
            logits = self._remember_logits(Path(folder))
            longest_s = 0.0

            for entry in ordered:
                kinds = {each.choice.dense for each in self._compared}
                is_late = self.budget.left_s("compare") < longest_s
                if entry.choice.dense in kinds and (is_late or len(self._compared) >= MAX_MADE):
                    entry.reject(_LATE if is_late else f"{MAX_MADE} others are more promising")
                elif self._is_hopeless(entry):
                    entry.reject("the widest of its kind is too far from the dense model")
                else:
                    began = self.budget.elapsed_s
                    self._try(entry, logits)
                    longest_s = max(longest_s, self.budget.elapsed_s - began)
                self._tell(entry)

        late = sum(entry.reason == _LATE for entry in self.entries)
        if late:
            self.notes.append(f"{late} candidates were not tried, for want of time: raise --budget")

    def _try(self, entry: Entry, logits: DenseLogits) -> None:
        try:
            self._make(entry)
        except UsageError as error:
            entry.reject(error.message)
            return

        entry.check(self._checked)

        assert entry.model
        assert entry.exported
        job = entry.choice.job
        path = entry.exported.path
        old_ids = job.renumbering(entry.model.folder)
        kl_nats = logits.compare(self._opener(job.backend, path), old_ids)
        entry.reached = "compared"
        if not math.isnan(kl_nats):  # else every trace has a token that is gone
            entry.kl_nats = max(0.0, kl_nats)

    def _make(self, entry: Entry) -> None:
        """Prune and export a candidate, or find it made."""
        build = self.build(entry.choice.job)
        entry.model = build.prune()
        entry.exported = build.export(entry.model.folder, name_artifact(build.job))

    def _is_hopeless(self, entry: Entry) -> bool:
        """Return whether a wider one of its kind is too far from the dense model to answer best."""
        if self.limits.objective != "accuracy" or not self._compared:
            return False
        nearest = max(min(each.distance for each in self._compared), _LEAST_KL)
        kind = [each.distance for each in self._compared if each.choice.kind == entry.choice.kind]
        return bool(kind) and min(kind) > _MAX_TIMES * nearest

    def run_race(self) -> list[Entry]:
        """Let the best ones answer the same prompts; return those that may win, the best first."""
        raced = self._choose_contestants()
        reference = self.reference
        by_name = {entry.name: entry for entry in (*raced, reference)}
        seconds, answers = 0.0, 0

        def ask(name: str, count: int) -> Scores:
            nonlocal seconds, answers
            entry = by_name[name]
            known = len(entry.scores) if entry.scores else 0
            began = self.budget.elapsed_s

            entry.scores = self._answer(entry, self.prompts[:count])
            entry.reached = "raced"
            seconds += self.budget.elapsed_s - began
            answers += count - known

            self.report("race", count, len(self.prompts))
            self._tell(entry)
            return entry.scores

        def has_time(more: int) -> bool:
            each_s = seconds / answers
            self.budget.learn("verify", each_s * 3 * len(self.job.problems("evaluation")))
            return each_s * more <= self.budget.left_s("race")

        least_ratio = self.job.recipe.tune.least_ratio
        self.race = Race(
            [entry.as_contestant() for entry in raced],
            self.limits.objective,
            reference.name,
            ask,
            len(self.prompts),
            least_ratio,
            has_time=has_time,
        )
        with self.budget.stage("race"):
            if least_ratio and reference.exported is None:
                self._make(reference)
            order = self.race.run()

        if self.race.is_cut:
            self.notes.append("the race ended early, for want of time: raise --budget")

        for entry in raced:
            entry.reject(self.race.stopped.get(entry.name, ""))
            if entry.name not in order:
                entry.reject(f"too little of {reference.name}'s accuracy on the same prompts")

        _refuse_unanswered(raced)
        return [by_name[name] for name in order]

    def _choose_contestants(self) -> list[Entry]:
        """Return the candidates that race: the nearest to the dense model, one of each kind."""
        compared = sorted(
            (entry for entry in self._compared if entry.is_active), key=lambda each: each.distance
        )
        if not compared:
            made = [entry for entry in self.entries if entry.exported]
            self._refuse(made or self.entries, "no candidate that was made")

        # Among its own kind: the best dense model is a rival although a pruned one beats it.
        front: frozenset[str] = frozenset()
        for is_dense in (True, False):
            front |= find_front(each for each in compared if each.choice.dense == is_dense)

        first = {entry.choice.dense: entry for entry in reversed(compared)}.values()
        is_far = self.limits.objective == "accuracy"
        farthest = math.inf
        if is_far:
            farthest = _MAX_TIMES * max(compared[0].distance, _LEAST_KL)

        chosen = {entry.name: entry for entry in first}
        for entry in compared:
            if entry.name in chosen:
                continue
            if entry.name not in front:
                entry.reject("another of its kind is as small, as fast and as near")
            elif entry.distance > farthest:
                entry.reject("too far from the dense model, beside the nearest")
            elif len(chosen) >= (MAX_RACED if is_far else MAX_MADE):
                entry.reject(f"{len(chosen)} others are nearer to the dense model")
            else:
                chosen[entry.name] = entry
        return list(chosen.values())

    @cached_property
    def reference(self) -> Entry:
        """The dense model in its widest format, whether or not it keeps the limits."""
        dense = [entry for entry in self.entries if entry.choice.dense]
        return max(dense, key=lambda entry: entry.cost.size_bytes)

    @cached_property
    def prompts(self) -> list[Problem]:
        """The race's prompts: others than those of the verification."""
        recipe = self.job.recipe
        wanted = recipe.tune.prompts
        later = {problem.question for problem in self.job.problems("evaluation")}
        seed = recipe.tune.seed + (recipe.tune.seed == recipe.verify.seed)
        drawn = self.job.tasks.draw(
            "evaluation", seed, round(_SPARE_PROMPTS * (wanted + len(later)))
        )
        fresh = [problem for problem in drawn if problem.question not in later]

        if len(fresh) < wanted:
            self.notes.append(
                f"the tasks have {len(fresh)} prompts beside those of the verification, so the "
                "race asked calibration prompts, too"
            )
            fresh += self.job.problems("calibration")
        return fresh[:wanted]

    def _answer(self, entry: Entry, problems: Sequence[Problem]) -> Scores:
        assert entry.model
        assert entry.exported
        evaluation = self.build(entry.choice.job).evaluation
        folder = entry.model.folder
        answers = evaluation.answer(entry.exported, entry.name, folder, problems=problems)
        return Scores.of(answers.records)

    def build(self, job: Job) -> Build:
        """Return the build of a job in the search's work folder."""
        return Build(job, self.work, self.threads, self.report)

    def report(self, label: str, done: int, total: int, tokens: int = 0) -> None:
        """Show how far a stage is, and how much of the budget is left."""
        if self.progress:
            whole = math.ceil(self.budget.budget_s)
            self.progress("budget", min(whole, round(self.budget.elapsed_s)), whole)
            self.progress(label, done, total, tokens)

    @property
    def device_row(self) -> DeviceRow:
        """The device as the report has it."""
        return DeviceRow(**self._predictor.device.model_dump(include=set(DeviceRow.model_fields)))

    def rows(self) -> list[Candidate]:
        """Return all candidates as the report has them."""
        return [entry.as_row() for entry in self.entries]

    def _tell(self, entry: Entry) -> None:
        if self.show:
            self.show(entry.as_row())

    @property
    def _active(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_active]

    @property
    def _compared(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.reached == "compared"]

    @property
    def _build(self) -> Build:
        return self.build(self.job)

    @property
    def _place(self) -> Workplace:
        return Workplace(self.work, self.threads)

    @cached_property
    def _workload(self) -> Workload:
        checkpoint = self.job.checkpoint
        weights = count_active_weights(checkpoint)
        stored = list_stored(self.job.recipe.export.format, "quant")
        narrow = [name for name in stored if quant.load(name).BITS <= MAX_BITS]
        return Workload(weights, checkpoint.shape.block_count, tuple(narrow))

    @property
    def _checked(self) -> Constraints:
        """The limits, without that of speed while speed is a rough guess."""
        unknown = {"min_tokens_per_s": None} if self.measures else {}
        return self.limits.model_copy(update=unknown)

    def _opener(self, backend: str, model: Path) -> Opener:
        """Return what opens a model for exact logits, one sequence at a time."""
        context_tokens = self.job.recipe.verify.context_tokens
        settings = EngineSettings(context_tokens, 1, self.threads, cache_dtype="f32")
        return lambda: closing(open_engine(backend, model, settings))

    @cached_property
    def _traces(self) -> list[Trace]:
        """Traces of the dense model that are held out; others calibrate."""
        _, traces = self._build.traces()
        _, held_out, _ = self._build.prune_stage.select(traces)
        if not held_out:
            raise UsageError(
                "no-held-out-traces",
                f"none of {len(traces)} traces is held out, so candidates cannot be compared",
                remedy="raise --trace-prompts, or calibration.held_out_share",
            )
        return held_out

    def _remember_logits(self, folder: Path) -> DenseLogits:
        opener = self._opener("transformers", self.job.model.folder)
        traces = [(trace.prompt_ids, trace.completion_ids) for trace in self._traces]
        most = max(_LEAST_TRACES, self.job.recipe.verify.logit_traces)
        return DenseLogits(opener, traces[:most], folder)

    def _refuse_impossible(self) -> None:
        if not self._active:
            self._refuse(self.entries, f"none of {len(self.entries)} candidates")

    def _refuse(self, entries: Sequence[Entry], what: str) -> NoReturn:
        """Say what is possible where no candidate keeps the limits."""
        nearest, options = find_nearest(entries, self._checked)
        raise UsageError(
            "no-candidate-fits",
            f"{what} keeps the limits; the nearest is {nearest.name}: {nearest.reason}",
            remedy=options or "raise --budget to try more",
        )


def _refuse_unanswered(raced: Sequence[Entry]) -> None:
    """Refuse a race in which nobody was right: nothing can be said of anybody."""
    if any(entry.scores is not None and entry.scores.right_N.any() for entry in raced):
        return
    raise UsageError(
        "no-candidate-answers",
        f"none of {len(raced)} candidates answers a single prompt of the race right",
        remedy="ask what the model can answer: --task NAME; or raise verify.max_new_tokens",
    )

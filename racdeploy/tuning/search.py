"""The search: cheap predictions for all candidates, expensive measurements for the best few.

Sizes are computed and speeds predicted for all. The most promising of each kind are pruned and
exported, and compared with the dense model on held-out traces; the best of these race on prompts.
Every stage is stored in the work folder, so that the search can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from racdeploy import quant
from racdeploy.engines.decoding_speed import ENGINE
from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.packing import list_supported
from racdeploy.pipeline.artifact_sizes import SizePredictor
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.dense_logits import DenseLogits, make_opener
from racdeploy.pipeline.forecast import count_active_weights
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.pipeline.workspace import Workspace
from racdeploy.results.tuning import Candidate, Constraints, DeviceRow
from racdeploy.targets import Target
from racdeploy.tasks import Problem
from racdeploy.traces.trace import Trace
from racdeploy.tuning.budget import Budget, check_held_out, estimate_min_seconds
from racdeploy.tuning.candidates import MAX_BITS, CandidateSpec, propose_candidates
from racdeploy.tuning.entries import Entry, find_nearest, find_pareto_front, order_entries
from racdeploy.tuning.mixed_quants import propose_mixed_quant
from racdeploy.tuning.race import Race, Scores
from racdeploy.tuning.speed import (
    Workload,
    load_or_estimate_device,
    load_or_measure_device,
)
from racdeploy.verification.answer_sampler import EngineFactory

MAX_BUILT, MAX_RACED = 12, 6
_LATE = "no time was left to compare it"
_MIN_TRACES = 16  # compared, if there are as many
_DRAW_RATIO = 1.2  # drawn over wanted prompts: some may be duplicates
_MAX_KL_RATIO = 8.0  # to the lowest KL: a candidate beyond it is not the most accurate
_NEGLIGIBLE_KL = 1e-4  # nats: below it, accuracy does not suffer


@dataclass
class _RacePace:
    """Time that new answers took in a race."""

    seconds: float = 0.0
    answers: int = 0


@dataclass
class Search:
    """A search for the best model of a job's target.

    Args:
        work: work folder, in which stages are stored.
        scratch: folder for files that are needed during the search only.
        threads: 0 for one per core.
        on_candidate: called with a candidate's row when its state changes.
        entries: all candidates.
        excluded: names of candidates that are not possible → reason.
    """

    job: Job
    work: Path
    scratch: Path
    threads: int
    progress: Progress | None
    on_candidate: Callable[[Candidate], None] | None = None
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.budget = Budget(self.job.recipe.tune.budget_s)
        self._local_device = load_or_estimate_device(
            self._workspace, self._workload, self.job.backend
        )
        self._device = self.target.device or self._local_device
        self._sizes = SizePredictor(self.scratch)

    @cached_property
    def target(self) -> Target:
        """Target that the models will run on."""
        return Target.read(self.job.recipe.target)

    @property
    def measures_device(self) -> bool:
        """True if the device is this machine and has not been measured yet."""
        is_local = self.target.device is None and self.job.backend == ENGINE
        return is_local and not self._device.measured

    @cached_property
    def limits(self) -> Constraints:
        """Objective and limits; the default memory limit is the target's."""
        tune = self.job.recipe.tune
        return Constraints(
            objective=tune.objective,
            max_bytes=tune.max_bytes or None,
            max_memory_bytes=tune.max_memory_bytes or self.target.memory_limit_bytes,
            min_tokens_per_s=tune.min_tokens_per_s or None,
            min_accuracy_ratio=tune.effective_min_accuracy_ratio or None,
            budget_s=tune.budget_s,
        )

    def plan(self) -> None:
        """Predict the cost of every candidate and the minimum time of the search.

        Nothing is measured.

        Raises:
            UsageError: no candidate meets the limits, or there are too few traces or too little
                time; the message has the numbers.
        """
        specs, self.excluded = propose_candidates(self.job)
        for spec in specs:
            self._enter(spec)

        if self.limits.max_bytes:
            self._mix(self.limits.max_bytes)
        self._refuse_impossible()

        traces = self._build.known_traces
        if not traces:
            check_held_out(self.job)

        token_s = self._local_device.predict_token_s(self.reference.size.read_bytes)
        self.budget.expected_s = estimate_min_seconds(
            self.job,
            token_s,
            self._local_device.cores,
            traces,
            measures_device=self.measures_device,
        )
        self.budget.check()

    def _enter(self, spec: CandidateSpec) -> None:
        """Add a candidate with its predicted cost; reject duplicates and those over the limits."""
        try:
            size = self._sizes.predict(spec.job)
        except UsageError as error:
            self.excluded[spec.name] = error.message
            return

        entry = Entry(spec, size)
        entry.predict(self._device)
        for earlier in self.entries:
            if earlier.file_key == entry.file_key:
                entry.reject(f"the same file as {earlier.name}")
        entry.check(self._checked)
        self.entries.append(entry)

    def _mix(self, max_bytes: int) -> None:
        """Add a mixed-format variant of the widest candidate of each kind, to use up the limit."""
        by_size = sorted(self._active, key=lambda each: each.size_bytes)
        widest = {entry.spec.kind: entry for entry in by_size}
        for entry in widest.values():
            if spec := propose_mixed_quant(entry.spec, entry.size, max_bytes):
                self._enter(spec)

    def measure(self) -> None:
        """Measure this machine if it is the device, and reject candidates that are too slow."""
        with self.budget.stage("measure"):
            if self.measures_device:
                workspace = replace(self._workspace, progress=self.report)
                self._device = load_or_measure_device(workspace, self.scratch, self._workload)

        for entry in self.entries:
            entry.predict(self._device)
            entry.check(self._checked)
            self._tell(entry)
        self._refuse_impossible()

    def compare(self) -> None:
        """Make the most promising candidates, and measure their KL from the dense model."""
        with self.budget.stage("traces"):
            _ = self._traces  # collects them
        self.budget.update_pace("traces", self.budget.seconds["traces"])

        ordered = order_entries(self._active, self.limits.objective)
        with self.budget.stage("compare"):
            opener = self._opener("transformers", self.job.model.folder)
            traces = [(trace.prompt_ids, trace.completion_ids) for trace in self._traces]
            count = max(_MIN_TRACES, self.job.recipe.verify.logit_traces)
            logits = DenseLogits(opener, traces[:count])

            longest_s = 0.0

            # At least one dense and one pruned candidate is made, whatever the time.
            for entry in ordered:
                kinds = {each.spec.dense for each in self._compared}
                is_late = self.budget.remaining_s("compare") < longest_s
                if entry.spec.dense in kinds and (is_late or len(self._compared) >= MAX_BUILT):
                    entry.reject(_LATE if is_late else f"{MAX_BUILT} others are more promising")
                elif self._is_hopeless(entry):
                    entry.reject("the KL of a wider one of its kind is too high")
                else:
                    began = self.budget.elapsed_s
                    self._try(entry, logits)
                    longest_s = max(longest_s, self.budget.elapsed_s - began)
                self._tell(entry)

        late = sum(entry.reason == _LATE for entry in self.entries)
        if late:
            self.notes.append(f"{late} candidates were not tried for lack of time: raise --budget")

    def _try(self, entry: Entry, logits: DenseLogits) -> None:
        """Make a candidate, check its real size, and measure its KL."""
        try:
            self._make(entry)
        except UsageError as error:
            entry.reject(error.message)
            return

        entry.check(self._checked)

        assert entry.model
        assert entry.exported
        job = entry.spec.job
        path = entry.exported.path
        old_ids = job.find_old_ids(entry.model.folder)
        kl_nats = logits.measure_kl(self._opener(job.backend, path), old_ids)
        entry.reached = "compared"
        if not math.isnan(kl_nats):  # else every trace has a token that was cut
            entry.kl_nats = max(0.0, kl_nats)

    def _make(self, entry: Entry) -> None:
        """Prune and export a candidate, or reuse what is in the work folder."""
        build = self.build(entry.spec.job)
        entry.model = build.prune()
        entry.exported = build.export(entry.model.folder, name_artifact(build.job))

    def _is_hopeless(self, entry: Entry) -> bool:
        """Return True if a wider one of its kind already has too high a KL to be the best."""
        if self.limits.objective != "accuracy" or not self._compared:
            return False
        nearest = max(min(each.distance for each in self._compared), _NEGLIGIBLE_KL)
        kind = [each.distance for each in self._compared if each.spec.kind == entry.spec.kind]
        return bool(kind) and min(kind) > _MAX_KL_RATIO * nearest

    def run_race(self) -> list[Entry]:
        """Race the best candidates on prompts; return those that may win, the best first."""
        raced = self._choose_contestants()
        reference = self.reference
        by_name = {entry.name: entry for entry in (*raced, reference)}
        pace = _RacePace()

        def ask(name: str, count: int) -> Scores:
            return self._ask_contestant(by_name[name], count, pace)

        def has_time(more: int) -> bool:
            # What an answer took in the race also corrects the expectation for the verification.
            each_s = pace.seconds / pace.answers
            self.budget.update_pace("verify", each_s * 3 * len(self.job.problems("evaluation")))
            return each_s * more <= self.budget.remaining_s("race")

        min_ratio = self.job.recipe.tune.effective_min_accuracy_ratio
        race = Race(
            contestants=[entry.as_contestant() for entry in raced],
            objective=self.limits.objective,
            reference=reference.name,
            ask=ask,
            prompts=len(self.prompts),
            min_accuracy_ratio=min_ratio,
            has_time=has_time,
        )
        with self.budget.stage("race"):
            if min_ratio and reference.exported is None:
                self._make(reference)
            order = race.run()

        if race.is_timed_out:
            self.notes.append("the race ended early for lack of time: raise --budget")

        for entry in raced:
            entry.reject(race.stopped.get(entry.name, ""))
            if entry.name not in order:
                entry.reject(f"too low an accuracy beside {reference.name} on the same prompts")

        _refuse_unanswered(raced)
        return [by_name[name] for name in order]

    def _ask_contestant(self, entry: Entry, count: int, pace: _RacePace) -> Scores:
        """Let a contestant answer the first prompts; those that it knows cost nothing."""
        answered_before = len(entry.scores) if entry.scores else 0
        began = self.budget.elapsed_s

        entry.scores = self._answer(entry, self.prompts[:count])
        entry.reached = "raced"
        pace.seconds += self.budget.elapsed_s - began
        pace.answers += count - answered_before

        self.report("race", count, len(self.prompts))
        self._tell(entry)
        return entry.scores

    def _choose_contestants(self) -> list[Entry]:
        """Return the contestants: those of lowest KL, at least a dense and a pruned one."""
        compared = sorted(
            (entry for entry in self._compared if entry.is_active), key=lambda each: each.distance
        )
        if not compared:
            made = [entry for entry in self.entries if entry.exported]
            self._refuse(made or self.entries, "no candidate that was made")

        # Dense and pruned ones have separate fronts: the winner's rival is of the other kind.
        front: frozenset[str] = frozenset()
        for is_dense in (True, False):
            front |= find_pareto_front(each for each in compared if each.spec.dense == is_dense)

        nearest = {entry.spec.dense: entry for entry in reversed(compared)}.values()
        for_accuracy = self.limits.objective == "accuracy"
        max_distance = math.inf
        if for_accuracy:
            max_distance = _MAX_KL_RATIO * max(compared[0].distance, _NEGLIGIBLE_KL)

        chosen = {entry.name: entry for entry in nearest}
        for entry in compared:
            if entry.name in chosen:
                continue
            if entry.name not in front:
                entry.reject("another of its kind is as small, as fast, and has as low a KL")
            elif entry.distance > max_distance:
                entry.reject("its KL is too high beside the lowest")
            elif len(chosen) >= (MAX_RACED if for_accuracy else MAX_BUILT):
                entry.reject(f"{len(chosen)} others have a lower KL")
            else:
                chosen[entry.name] = entry
        return list(chosen.values())

    @cached_property
    def reference(self) -> Entry:
        """The dense model in its widest format, even if it breaks the limits."""
        dense = [entry for entry in self.entries if entry.spec.dense]
        return max(dense, key=lambda entry: entry.size.size_bytes)

    @cached_property
    def prompts(self) -> list[Problem]:
        """Prompts of the race, different from those of the verification as far as possible."""
        recipe = self.job.recipe
        wanted = recipe.tune.prompts
        verified = {problem.question for problem in self.job.problems("evaluation")}
        # The same seed would draw the prompts of the verification.
        seed = recipe.tune.seed + (recipe.tune.seed == recipe.verify.seed)
        drawn = self.job.tasks.draw(
            "evaluation", seed, round(_DRAW_RATIO * (wanted + len(verified)))
        )
        fresh = [problem for problem in drawn if problem.question not in verified]

        if len(fresh) < wanted:
            self.notes.append(
                f"the tasks have {len(fresh)} prompts beside those of the verification, so the "
                "race asked calibration prompts, too"
            )
            fresh += self.job.problems("calibration")
        return fresh[:wanted]

    def _answer(self, entry: Entry, problems: Sequence[Problem]) -> Scores:
        """Let a candidate answer prompts; answers in the work folder are reused."""
        assert entry.model
        assert entry.exported
        evaluation = self.build(entry.spec.job).evaluation
        answers = evaluation.answer(entry.exported, entry.name, entry.model.folder, problems)
        return Scores.from_records(answers.records)

    def build(self, job: Job) -> Build:
        """Return the build of a job in the search's work folder."""
        build = Build(job, self.work, self.threads, self.report)
        return build.with_answer_limit()

    def report(self, label: str, done: int, total: int, tokens: int = 0) -> None:
        """Report the progress of a stage and of the budget."""
        if self.progress:
            whole = math.ceil(self.budget.budget_s)
            self.progress("budget", min(whole, round(self.budget.elapsed_s)), whole)
            self.progress(label, done, total, tokens)

    @property
    def device_row(self) -> DeviceRow:
        """Row of the device in the search's result."""
        return DeviceRow(**self._device.model_dump(include=set(DeviceRow.model_fields)))

    def rows(self) -> list[Candidate]:
        """Return the rows of all candidates in the search's result."""
        return [entry.as_row() for entry in self.entries]

    def _tell(self, entry: Entry) -> None:
        if self.on_candidate:
            self.on_candidate(entry.as_row())

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
    def _workspace(self) -> Workspace:
        return Workspace(self.work, self.threads)

    @cached_property
    def _workload(self) -> Workload:
        checkpoint = self.job.checkpoint
        weights = count_active_weights(checkpoint)
        stored = list_supported(self.job.recipe.export.format, "quant")
        narrow = [name for name in stored if quant.load(name).bits <= MAX_BITS]
        return Workload(weights, checkpoint.shape.block_count, tuple(narrow))

    @property
    def _checked(self) -> Constraints:
        """Limits that are checked: without that of speed while speed is a rough estimate."""
        unknown = {"min_tokens_per_s": None} if self.measures_device else {}
        return self.limits.model_copy(update=unknown)

    def _opener(self, backend: str, model: Path) -> EngineFactory:
        return make_opener(backend, model, self.job.verification.context_tokens, self.threads)

    @cached_property
    def _traces(self) -> list[Trace]:
        """Held-out traces of the dense model; the others are for calibration."""
        _, traces = self._build.traces()
        held_out = self._build.prune_stage.choose_traces(traces).held_out
        if not held_out:
            raise UsageError(
                "no-held-out-traces",
                f"none of {len(traces)} traces is held out, so candidates cannot be compared",
                remedy="raise --trace-prompts, or calibration.held_out_share",
            )
        return held_out

    def _refuse_impossible(self) -> None:
        if not self._active:
            self._refuse(self.entries, f"none of {len(self.entries)} candidates")

    def _refuse(self, entries: Sequence[Entry], subject: str) -> NoReturn:
        """Raise an error that names the nearest candidate and the limits it would meet."""
        nearest, options = find_nearest(entries, self._checked)
        raise UsageError(
            "no-candidate-fits",
            f"{subject} meets the limits; the nearest is {nearest.name}: {nearest.reason}",
            remedy=options or "raise --budget to try more",
        )


def _refuse_unanswered(raced: Sequence[Entry]) -> None:
    """Raise if no answer of the race was correct: then it has no result."""
    if any(entry.scores is not None and entry.scores.right_N.any() for entry in raced):
        return
    raise UsageError(
        "no-candidate-answers",
        f"none of {len(raced)} candidates answers any prompt of the race correctly",
        remedy="use a task that the model can do: --tasks NAME; or raise verify.max_new_tokens",
    )

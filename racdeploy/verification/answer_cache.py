"""Answers in the work folder: one cache for builds, searches, comparisons and verifications.

``WORK/answers-HASH`` is named by everything that a completion depends on: the files, the decoding
settings, the engine, the machine, and the code from here to the engines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from racdeploy import __version__
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.files.code_hashes import base_version, code_hash
from racdeploy.files.reading import Json, read_json
from racdeploy.files.stages import Stage
from racdeploy.files.writing import write_atomic
from racdeploy.processes.heap import trim_heap
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import (
    NO_ANSWERS,
    AnswerSampler,
    EngineFactory,
    SampledAnswers,
)
from racdeploy.verification.subject import Subject

_LOG = "completions.jsonl"
_COSTS = "cost.json"


@dataclass(frozen=True)
class AnswerCache:
    """Answers below a work folder; those of an interrupted run are always reused.

    Args:
        repeats_finished: ask again where an earlier run has finished, for figures of this run.
        keeps: leave the answers for later runs; else :meth:`forget` removes them.
    """

    work: Path
    repeats_finished: bool = False
    keeps: bool = True
    _new: dict[Path, Stage] = field(default_factory=dict, init=False, compare=False)
    _repeated: dict[Path, Stage] = field(default_factory=dict, init=False, compare=False)
    _asked: dict[tuple[Path, str], SampledAnswers] = field(
        default_factory=dict, init=False, compare=False
    )

    def answer(
        self,
        subject: Subject,
        sampler: AnswerSampler,
        opener: EngineFactory,
        *,
        problems: Sequence[Problem],
        arm: str,
        inputs: Json,
        is_interim: bool = False,
    ) -> SampledAnswers:
        """Answer the problems of which the cache has no answers, and return all answers.

        Args:
            arm: name of the model in the records.
            inputs: everything that a completion depends on, without the code and the engine's name.
            is_interim: whether this run may ask more problems, which begin with these.

        Returns:
            The answers; if some are of a finished run, with the statistics of its engine.
        """
        trim_heap()  # or what ran before would add to the memory that is measured now
        code = {"version": base_version(__version__), "code": code_hash(__name__)}
        stage = Stage.open(self.work, "answers", {**code, "backend": subject.backend, **inputs})
        log = stage.folder / _LOG

        asked = (stage.folder, arm)
        before = self._asked.get(asked, NO_ANSWERS)
        is_finished = stage.is_finished
        if is_finished and self.repeats_finished and not before.records:
            log.unlink(missing_ok=True)
        if not self.keeps:
            self._borrow(stage)

        samples = sampler.settings.samples
        skipped = len(before.records) // samples
        try:
            later = sampler.answer(opener, problems, arm, CompletionLog(log), skipped=skipped)
        except BaseException:  # the program may live on, and another process resumes them
            stage.release()
            raise

        # Answers of this run's earlier steps are in memory: the log would count them as resumed.
        answers = before.join(later)
        if is_interim or before.records:
            self._asked[asked] = answers
        answers = answers.take(len(problems) * samples)

        if is_interim:
            if self.keeps:
                stage.release()
            return answers
        return self._finish(stage, answers, was_finished=is_finished)

    def _finish(
        self, stage: Stage, answers: SampledAnswers, *, was_finished: bool
    ) -> SampledAnswers:
        """Record what the answers have cost; return them with the costs of a finished run."""
        costs = stage.folder / _COSTS
        if was_finished and not self.repeats_finished and answers.reused:
            counted = read_json(costs) if costs.is_file() else {}
            stage.release()
            stats = {name: float(value) for name, value in counted.get("stats", {}).items()}
            kernels = str(counted.get("kernels", ""))
            return replace(answers, reused_stats=stats, kernels=kernels)

        # Seconds differ from run to run, so they are not part of the stage's own summary.
        write_atomic(costs, json.dumps({"stats": dict(answers.stats), "kernels": answers.kernels}))
        if self.keeps:
            stage.finish({"answers": len(answers.records)})
            # The answers are in memory now, and a program that has built may live on for long.
            stage.release()
        return answers

    def forget(self) -> None:
        """Remove the answers of this run, except those that a build had finished before."""
        for stage in self._new.values():
            stage.remove()
        for folder, stage in self._repeated.items():
            stage.finish({"answers": len((folder / _LOG).read_bytes().splitlines())})
            stage.release()

    def release(self) -> None:
        """Keep the answers of this run for the next one, also of another process."""
        for stage in (*self._new.values(), *self._repeated.values()):
            stage.release()

    def _borrow(self, stage: Stage) -> None:
        """Take a stage for this run alone: while it answers, the stage is not finished."""
        folder = stage.folder
        if stage.is_finished:
            self._repeated[folder] = stage
            stage.reopen()  # an interrupted run resumes its own answers
        elif folder not in self._repeated:
            self._new[folder] = stage

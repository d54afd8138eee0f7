"""What is asked of a model: one file per task.

A procedural task has ``draw(random) -> Problem``; a task over a file has ``read(path) ->
list[Problem]``. Which split a question belongs to is decided by a hash of its text, so training,
calibration and evaluation never share one, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Literal

from racdeploy import plugins
from racdeploy.errors import UsageError

__all__ = [
    "Problem",
    "Split",
    "Task",
    "TaskSet",
    "load",
    "problems_of",
    "procedural_names",
    "split_share",
]

Split = Literal["training", "calibration", "evaluation"]
PROCEDURAL_SHARES: dict[Split, tuple[float, float]] = {
    "training": (0.0, 0.6),
    "calibration": (0.6, 0.8),
    "evaluation": (0.8, 1.0),
}
FILE_SHARES: dict[Split, tuple[float, float]] = {
    "training": (0.0, 0.0),
    "calibration": (0.0, 0.5),
    "evaluation": (0.5, 1.0),
}
_DRAWS_PER_PROBLEM = 1000
_SAFE_QUESTIONS = 20
"""One of two halves of so many is empty once in 500,000 files."""
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
REFUSED = {
    "gsm8k": f"racdeploy ships no benchmark; curl -LO {GSM8K}/test.jsonl, then write "
    "--task jsonl:test.jsonl",
}
"""Names that people try, and what to do in their place."""
_CONVERT = (
    "python -c \"import csv, json, sys; [print(json.dumps({k: row[k] for k in ('question', "
    "'answer')})) for row in csv.DictReader(sys.stdin)]\" < %s > %s"
)


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer."""

    question: str  # what the user asks, without a chat template
    gold: str  # the right answer, as its scorer expects it
    thinking: str | None = None  # a worked solution, where the task can write one (training only)
    task: str = ""  # the task's specification, filled in by :func:`problems_of`
    scorer: str = ""  # of :mod:`racdeploy.scorers`; empty is its default


@dataclass(frozen=True)
class Task:
    """A loaded task."""

    spec: str  # what the user typed, ``jsonl:FILE`` or a plain name
    draw: Callable[[Random], Problem] | None  # makes a problem; None for a task over a file
    pool: tuple[Problem, ...]
    # Which part of all questions, by their hash, each split gets.
    shares: Mapping[Split, tuple[float, float]] = field(default_factory=dict)
    repeated: int = 0  # problems of a file whose question another one has, too

    def serving(self, split: Split, *, whole: bool) -> Task:
        """Return the task for one split; with ``whole``, a file gives that split all it has."""
        if self.draw or not whole:
            return self
        return replace(self, shares={split: (0.0, 1.0)})

    def describe_pool(self) -> str:
        """Return how many questions a file has, and how many of them each half got."""
        questions = f"{len(self.pool)} question{'s' if len(self.pool) > 1 else ''}"
        if self.repeated:
            total = len(self.pool) + self.repeated
            questions += f" ({self.repeated} of its {total} lines repeat another)"

        calibration = self.available("calibration")
        evaluation = self.available("evaluation")
        return f"{questions}: {calibration} for calibration, {evaluation} for evaluation"

    def available(self, split: Split) -> int | None:
        """Return how many problems a split of a file holds, or None where they are drawn."""
        return None if self.draw else len(self._members(split))

    def problems(self, split: Split, seed: int, count: int) -> list[Problem]:
        """Return ``count`` distinct problems of a split, or fail; the same ones for a seed."""
        random = Random(f"{self.spec.partition(':')[0]}/{split}/{seed}")
        if self.draw:
            found = self._draw_distinct(self.draw, random, split, count)
        else:
            found = self._members(split)
            random.shuffle(found)

        if len(found) < count:
            raise UsageError(
                f"task {self.spec!r} has {len(found)} {split} problems, {count} were asked for",
                remedy="ask for fewer prompts in the recipe, or give a task with more of them",
            )

        return [replace(problem, task=self.spec) for problem in found[:count]]

    def _draw_distinct(
        self, draw: Callable[[Random], Problem], random: Random, split: Split, count: int
    ) -> list[Problem]:
        found: dict[str, Problem] = {}
        for _ in range(count * _DRAWS_PER_PROBLEM):
            if len(found) == count:
                break

            problem = draw(random)
            if self._serves(split, problem):
                found.setdefault(problem.question, problem)

        return [*found.values()]

    def _members(self, split: Split) -> list[Problem]:
        return [problem for problem in self.pool if self._serves(split, problem)]

    def _serves(self, split: Split, problem: Problem) -> bool:
        low, high = self.shares[split]
        return low <= split_share(problem.question) < high


@dataclass(frozen=True)
class TaskSet:
    """What a model is asked, by specification: when it is verified, and when it is calibrated."""

    evaluation: Mapping[str, Task]
    calibration: Mapping[str, Task]

    @classmethod
    def load(cls, evaluation: Sequence[str], calibration: Sequence[str]) -> TaskSet:
        """Load tasks: by default all procedural ones, and for calibration those of evaluation."""
        evaluation = tuple(evaluation) or procedural_names()
        calibration = tuple(calibration) or evaluation

        for specs in (evaluation, calibration):
            if len(set(specs)) < len(specs):
                twice = f"a task is named twice: {', '.join(specs)}"
                raise UsageError(twice, remedy="name each task once")

        asked = {spec: load(spec) for spec in evaluation}
        others = {spec: asked.get(spec) or load(spec) for spec in calibration}
        return cls(asked, others)

    def draw(self, split: Split, seed: int, count: int) -> list[Problem]:
        """Return up to ``count`` problems of a split, evenly shared; a file for it alone: all."""
        asked = self.calibration if split == "calibration" else self.evaluation
        alone = self.evaluation.keys().isdisjoint(self.calibration)
        chosen = [task.serving(split, whole=alone) for task in asked.values()]
        wanted = count

        for task in chosen:
            available = task.available(split)
            if available is not None:
                count = min(count, len(chosen) * available)

        if not count:
            raise _refuse_few(chosen, split, wanted)

        return problems_of(chosen, split, seed, count)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on files in which questions repeat."""
        files = {**self.evaluation, **self.calibration}
        return tuple(
            f"{task.spec} has {task.repeated} lines whose question another line has, too: "
            f"each of {len(task.pool)} questions counts once"
            for task in files.values()
            if task.repeated
        )

    def identify_calibration(self) -> list[dict[str, str]]:
        """Return what decides the calibration prompts: names of tasks, hashes of their files."""
        identities = []
        for spec, task in self.calibration.items():
            name, _, _ = spec.partition(":")
            lines = [f"{each.question}\0{each.gold}\0{each.scorer}" for each in task.pool]
            pool = "\n".join(lines).encode()
            identities.append({"name": name, "pool": hashlib.sha256(pool).hexdigest()})
        return identities


def load(spec: str) -> Task:
    """Load a task by name, or by ``name:argument`` where it reads a file."""
    name, colon, argument = spec.partition(":")
    if not colon:
        refuse_path(spec)
    module = plugins.load("tasks", name)

    if hasattr(module, "read"):
        if not argument:
            raise UsageError(f"task {name!r} needs a file", remedy=f"write --task {name}:FILE")

        refuse_table(argument)
        read = module.read(Path(argument))
        by_question = {problem.question: problem for problem in read}
        pool = tuple(by_question.values())

        return Task(spec, None, pool, FILE_SHARES, repeated=len(read) - len(pool))

    if colon:
        raise UsageError(f"task {name!r} takes no argument", remedy=f"write --task {name}")

    return Task(spec, module.draw, (), PROCEDURAL_SHARES)


def refuse_path(spec: str) -> None:
    """Refuse a file that is given where a task is expected, with how it is given."""
    refuse_table(spec)
    if spec.endswith((".jsonl", ".json")):
        raise UsageError(f"{spec} is a file and not a task", remedy=f"write --task jsonl:{spec}")


def refuse_table(path: str) -> None:
    """Refuse a table, with what makes lines of JSON of it."""
    stem, dot, suffix = path.rpartition(".")
    if suffix.lower() not in ("csv", "tsv", "xlsx", "parquet") or not dot:
        return

    remedy = 'save it as lines of {"question": "…", "answer": "…"}, then --task jsonl:FILE'
    if suffix.lower() == "csv":
        made = f"{stem}.jsonl"
        remedy = f"{_CONVERT % (path, made)}, then --task jsonl:{made}"
    raise UsageError(f"{path} is a table; racdeploy reads .jsonl files", remedy=remedy)


def _refuse_few(tasks: Sequence[Task], split: Split, wanted: int) -> UsageError:
    files = [f"{task.spec} has {task.describe_pool()}" for task in tasks if task.draw is None]
    return UsageError(
        f"the task holds no {split} problem: {'; '.join(files)}",
        remedy=f"a hash of its text decides the half of a question: give {_SAFE_QUESTIONS} "
        f"different ones at least, {2 * wanted} for the {wanted} prompts that are asked for; or "
        "two files, --task jsonl:ONE and --calibration-task jsonl:OTHER",
    )


def procedural_names() -> tuple[str, ...]:
    """Return the tasks that need no file."""
    names = plugins.names("tasks")
    return tuple(name for name in names if hasattr(plugins.load("tasks", name), "draw"))


def problems_of(tasks: Sequence[Task], split: Split, seed: int, count: int) -> list[Problem]:
    """Share ``count`` problems evenly among tasks and interleave them."""
    share, rest = divmod(count, len(tasks))

    columns = []

    for place, task in enumerate(tasks):
        own = share + 1 if place < rest else share
        columns.append(task.problems(split, seed, own))

    rows = itertools.zip_longest(*columns)
    return [problem for row in rows for problem in row if problem is not None]


def split_share(question: str) -> float:
    """Return the place of a question in [0, 1), decided by a hash of its text alone."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

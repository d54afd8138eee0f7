"""What is asked of a model: tasks in ``sets/``, scorers in ``scorers/``, one file each.

A procedural task has ``draw(random) -> Problem``; a task over a file has ``read(path) ->
list[Problem]``; a public set has ``SET`` and ``ask(row) -> Problem``. Which split a question
belongs to is decided by a hash of its text, so training, calibration and evaluation never share
one, whatever the seeds. Splits that a set was published with are kept.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.tasks import scoring
from racdeploy.tasks.published import Published, read_hub, read_local
from racdeploy.tasks.rows import SUFFIXES, Row, refuse_table
from racdeploy.tasks.task import (
    FILE_SHARES,
    HUB,
    PROCEDURAL_SHARES,
    Problem,
    Split,
    Task,
    name_of,
    split_share,
)

__all__ = [
    "Problem",
    "Split",
    "Task",
    "TaskSet",
    "follows",
    "load",
    "problems_of",
    "procedural_names",
    "public_names",
    "split_share",
]

_SAFE_QUESTIONS = 20
"""One of two halves of so many is empty once in 500,000 files."""


@dataclass(frozen=True)
class TaskSet:
    """What a model is asked, by specification: when it is verified, and when it is calibrated."""

    evaluation: Mapping[str, Task]
    calibration: Mapping[str, Task]

    @classmethod
    def load(cls, evaluation: Sequence[str], calibration: Sequence[str]) -> TaskSet:
        """Load tasks: by default all procedural ones, and for calibration those of evaluation.

        A public set without training questions is only evaluated on; others must calibrate.
        """
        evaluation = tuple(evaluation) or procedural_names()

        for specs in (evaluation, calibration):
            if len(set(specs)) < len(specs):
                twice = f"a task is named twice: {', '.join(specs)}"
                raise UsageError("task-named-twice", twice, remedy="name each task once")

        asked = {spec: load(spec) for spec in evaluation}
        trained = [spec for spec in asked if asked[spec].calibrates]

        others = {}
        for spec in calibration or trained:
            if spec in asked and spec not in trained:
                raise _refuse_untrained(asked[spec])
            others[spec] = asked.get(spec) or load(spec)

        if not others:
            raise _refuse_untrained(asked[evaluation[0]])
        return cls(asked, others)

    def draw(self, split: Split, seed: int, count: int) -> list[Problem]:
        """Return up to ``count`` problems of a split, evenly shared; a file for it alone: all."""
        asked, others = self.evaluation, self.calibration
        if split == "calibration":
            asked, others = others, asked

        chosen = [task.serving(split, whole=spec not in others) for spec, task in asked.items()]
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

    @property
    def sources(self) -> tuple[str, ...]:
        """Sentences on files and public sets: where from, how split, as which harness asks."""
        told: list[str] = []
        calibration = ", ".join(self.calibration)

        for spec, task in {**self.evaluation, **self.calibration}.items():
            whole = spec not in self.evaluation or spec not in self.calibration
            told += task.describe(whole=whole)

            if spec in self.evaluation and not task.calibrates:
                told.append(f"{spec} is only evaluated on; calibration: {calibration}")

        # A set is told of once, also where a file of it is there beside the Hub's.
        return tuple(dict.fromkeys(told))

    def identify_calibration(self) -> list[dict[str, str]]:
        """Return what decides the calibration prompts: names of tasks, hashes of their files."""
        identities = []

        for spec, task in self.calibration.items():
            serving = task.serving("calibration", whole=spec not in self.evaluation)
            problems = task.pool if serving.trained is None else serving.trained

            lines = [f"{each.question}\0{each.gold}\0{each.scorer}" for each in problems]
            pool = "\n".join(lines).encode()
            identities.append({"name": name_of(spec), "pool": hashlib.sha256(pool).hexdigest()})
        return identities


def load(spec: str) -> Task:
    """Load a task by name, by ``name:argument`` where it reads a file, or by ``hub:name``."""
    name, colon, argument = spec.partition(":")
    if not colon:  # a file in the place of a task
        refuse_table(spec)
        if spec.endswith((".jsonl", ".json")):
            remedy = f"write --task jsonl:{spec}"
            raise UsageError("file-as-task", f"{spec} is a file and not a task", remedy=remedy)

    if name == HUB:
        return _load_published(spec, plugins.load("tasks", _find_set(argument)), "")

    module = plugins.load("tasks", name)

    if hasattr(module, "SET"):
        if not argument:
            raise _refuse_unsourced(name, module.SET)
        return _load_published(spec, module, argument)

    if hasattr(module, "read"):
        if not argument:
            raise UsageError(
                "task-needs-file", f"task {name!r} needs a file", remedy=f"write --task {name}:FILE"
            )

        refuse_table(argument)
        pool, repeated = _keep_once(module.read(Path(argument)))
        return Task(spec, None, pool, FILE_SHARES, repeated)

    if colon:
        raise UsageError(
            "takes-no-argument", f"task {name!r} takes no argument", remedy=f"write --task {name}"
        )

    return Task(spec, module.draw, (), PROCEDURAL_SHARES)


def _load_published(spec: str, module: ModuleType, path: str) -> Task:
    """Load a public set from a path; from the Hub if that is empty."""
    published: Published = module.SET
    read = read_local(published, Path(path)) if path else read_hub(published)
    evaluation, calibration = read

    asked = _ask_all(module, evaluation, spec)
    pool, repeated = _keep_once(asked)
    for scorer in {problem.scorer for problem in pool}:
        scoring.check(scorer)

    task = Task(spec, None, pool, FILE_SHARES, repeated, published)
    if calibration is None:
        return task

    # A few sets have a question in both splits: it is for evaluation.
    taught = _ask_all(module, calibration, spec)
    tested = {problem.question for problem in pool}
    trained, _ = _keep_once([problem for problem in taught if problem.question not in tested])
    return replace(task, trained=trained)


def _ask_all(module: ModuleType, rows: Sequence[Row], spec: str) -> list[Problem]:
    """Return a problem for each row; the first row that is not as published is refused."""
    problems: list[Problem] = []

    for number, row in enumerate(rows, 1):
        place = f"{spec}: row {number}"
        _check_columns(module.SET, row, place)
        try:
            problems.append(module.ask(row))
        except UsageError as error:
            error.message = f"{place}: {error.message}"
            raise

    return problems


def _check_columns(published: Published, row: Row, place: str) -> None:
    page = f"https://huggingface.co/datasets/{published.evaluation.dataset}"
    for column in published.columns:
        if row.get(column) in (None, "", []):
            raise UsageError(
                "missing-column",
                f"{place} has no {column!r}; its columns are {', '.join(row)}",
                remedy=f"give {published.title} as it was published: {page}",
            )


def _keep_once(problems: Sequence[Problem]) -> tuple[tuple[Problem, ...], int]:
    """Return the problems, each question once, and how many repeat another's."""
    by_question = {problem.question: problem for problem in problems}
    return tuple(by_question.values()), len(problems) - len(by_question)


def public_names() -> tuple[str, ...]:
    """Return the names of the public sets."""
    return _names_with("SET")


def follows(spec: str) -> str:
    """Return whose prompt and score a task has, harness and version; empty for our own."""
    name = name_of(spec)
    if name not in plugins.names("tasks"):
        return ""

    published = getattr(plugins.load("tasks", name), "SET", None)
    return published.follows if published else ""


def _find_set(name: str) -> str:
    """Return the name, or the one of a dataset's id on the Hub; refuse what is no public set."""
    known = public_names()
    for each in known:
        if plugins.load("tasks", each).SET.evaluation.dataset.casefold() == name.casefold():
            raise UsageError(
                "dataset-as-task", f"{name} is task {each!r}", remedy=f"write --task {HUB}:{each}"
            )

    if name not in known:
        raise UsageError(
            "unknown-public-set",
            f"{name or 'nothing'} is no public set{plugins.closest(name, known)}",
            remedy=f"known: {', '.join(known)}; your own questions: --task jsonl:FILE",
        )
    return name


def _refuse_unsourced(name: str, published: Published) -> UsageError:
    forms = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
    return UsageError(
        "task-needs-questions",
        f"task {name!r} needs its questions, which racdeploy neither ships nor downloads unasked",
        remedy=f"--task {HUB}:{name} reads {published.evaluation.dataset} from the Hub "
        f'(pip install "racdeploy[tasks]"); --task {name}:PATH reads what you have of it '
        f"({forms}, or a folder saved by datasets)",
    )


def _refuse_untrained(task: Task) -> UsageError:
    assert task.published is not None
    title, name = task.published.title, name_of(task.spec)
    others = [each for each in ("math500", "gsm8k") if each != name]
    return UsageError(
        "no-training-questions",
        f"{title} has no training questions to calibrate on: all {len(task.pool)} are for "
        "evaluation",
        remedy=f"add --calibration-task {HUB}:{others[0]}, or any other task; "
        f"--task {name}:FILE splits a file of it by a hash",
    )


def _refuse_few(tasks: Sequence[Task], split: Split, wanted: int) -> UsageError:
    files = [f"{task.spec} has {task.describe_pool()}" for task in tasks if task.draw is None]
    return UsageError(
        "no-problems-for-split",
        f"the task holds no {split} problem: {'; '.join(files)}",
        remedy=f"a hash of its text decides the half of a question: give {_SAFE_QUESTIONS} "
        f"different ones at least, {2 * wanted} for the {wanted} prompts that are asked for; or "
        "two files, --task jsonl:ONE and --calibration-task jsonl:OTHER",
    )


def procedural_names() -> tuple[str, ...]:
    """Return the tasks that need no file."""
    return _names_with("draw")


def _names_with(member: str) -> tuple[str, ...]:
    names = plugins.names("tasks")
    return tuple(name for name in names if hasattr(plugins.load("tasks", name), member))


def share_evenly(count: int, tasks: int) -> list[int]:
    """Return how many of ``count`` problems each task has; the first ones have the rest."""
    share, rest = divmod(count, tasks)
    return [share + (place < rest) for place in range(tasks)]


def problems_of(tasks: Sequence[Task], split: Split, seed: int, count: int) -> list[Problem]:
    """Share ``count`` problems evenly among tasks and interleave them."""
    shares = share_evenly(count, len(tasks))
    columns = [task.problems(split, seed, own) for task, own in zip(tasks, shares, strict=True)]
    rows = itertools.zip_longest(*columns)
    return [problem for row in rows for problem in row if problem is not None]

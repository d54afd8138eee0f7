"""Tasks for models: problems in ``sets/``, scorers in ``scorers/``, one file each.

A procedural task has ``draw(random) -> Problem``; a task over a file has ``read(path) ->
list[Problem]``; a public dataset has ``DATASET`` and ``make_problem(row) -> Problem``; a library of
generators has ``open_generator(argument) -> Generator``. A hash of its text decides the split of a
question, so training, calibration and evaluation never share one, whatever the seeds. Published
splits of a dataset are kept.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import ModuleType

from racdeploy import plugins
from racdeploy.errors import UsageError, install_command
from racdeploy.tasks import scoring
from racdeploy.tasks.public_dataset import HubSplit, PublicDataset, read_hub, read_local
from racdeploy.tasks.rows import SUFFIXES, Row, refuse_table
from racdeploy.tasks.task import (
    FILE_SHARES,
    GENERATOR_SHARES,
    HUB,
    PROCEDURAL_SHARES,
    Generator,
    Problem,
    Split,
    Task,
    hash_to_unit,
    task_name,
)

__all__ = [
    "HubSplit",
    "Problem",
    "PublicDataset",
    "Row",
    "Split",
    "Task",
    "TaskSet",
    "draw_from_tasks",
    "find_protocol",
    "hash_to_unit",
    "list_procedural_tasks",
    "list_public_tasks",
    "load",
]

_SAFE_QUESTIONS = 20
"""Questions for which a hash leaves one of two halves empty in one of 500,000 files."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks of verification and of calibration, by specification."""

    evaluation: Mapping[str, Task]
    calibration: Mapping[str, Task]
    _drawn: dict[tuple[Split, int, int], list[Problem]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What was drawn: a plan of six rungs asks for the same problems dozens of times."""

    @classmethod
    def load(cls, evaluation: Sequence[str], calibration: Sequence[str]) -> TaskSet:
        """Load tasks: by default all procedural ones, and the same tasks for calibration.

        Raises:
            UsageError: a task is named twice, or no task has questions for calibration.
        """
        evaluation = tuple(evaluation) or list_procedural_tasks()
        for specs in (evaluation, calibration):
            _refuse_repeats(specs)

        evaluated = {spec: load(spec) for spec in evaluation}
        trained = [spec for spec in evaluated if evaluated[spec].has_calibration]

        calibrated = {}
        for spec in calibration or trained:
            if spec in evaluated and spec not in trained:
                raise _refuse_untrained(evaluated[spec])
            calibrated[spec] = evaluated.get(spec) or load(spec)

        if not calibrated:
            raise _refuse_untrained(evaluated[evaluation[0]])
        return cls(evaluated, calibrated)

    @classmethod
    def load_evaluation(cls, specs: Sequence[str]) -> TaskSet:
        """Load tasks of which nothing calibrates: every question of a file is for evaluation.

        Raises:
            UsageError: a task is named twice.
        """
        specs = tuple(specs) or list_procedural_tasks()
        _refuse_repeats(specs)
        return cls({spec: load(spec) for spec in specs}, {})

    def draw(self, split: Split, seed: int, count: int) -> list[Problem]:
        """Return up to ``count`` problems of a split, shared evenly among its tasks.

        A file that serves only this split gives all its problems to it.
        """
        key = split, seed, count
        if key not in self._drawn:
            self._drawn[key] = self._draw(split, seed, count)
        return [*self._drawn[key]]

    def _draw(self, split: Split, seed: int, count: int) -> list[Problem]:
        drawn_from, others = self.evaluation, self.calibration
        if split == "calibration":
            drawn_from, others = others, drawn_from

        chosen = [
            task.for_split(split, whole=spec not in others) for spec, task in drawn_from.items()
        ]
        wanted = count

        # Every task gives the same number: the smallest file limits all of them.
        for task in chosen:
            available = task.count_available(split)
            if available is not None:
                count = min(count, len(chosen) * available)

        if not count:
            files = [
                f"{task.spec} has {task.describe_pool()}" for task in chosen if not task.generator
            ]
            raise UsageError(
                "no-problems-for-split",
                f"the task holds no {split} problem: {'; '.join(files)}",
                remedy=f"questions are split in half by a hash of their text: give at least "
                f"{_SAFE_QUESTIONS} different ones, or {2 * wanted} for the {wanted} prompts asked "
                "for; or two files, --tasks jsonl:ONE and --calibration-tasks jsonl:OTHER",
            )

        return draw_from_tasks(chosen, split, seed, count)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on files with repeated questions."""
        files = {**self.evaluation, **self.calibration}
        return tuple(
            f"{task.spec} has {task.duplicate_count} lines that repeat another question: "
            f"each of {len(task.pool)} questions counts once"
            for task in files.values()
            if task.duplicate_count
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Sentences on files and public datasets: their source, split and protocol."""
        sentences = []
        calibration = ", ".join(self.calibration)

        for spec, task in {**self.evaluation, **self.calibration}.items():
            whole = spec not in self.evaluation or spec not in self.calibration
            sentences += task.describe(whole=whole)

            if spec in self.evaluation and not task.has_calibration:
                sentences.append(f"{spec} is only evaluated on; calibration: {calibration}")

        # Once for each dataset, even if it comes from a file as well as from the Hub.
        return tuple(dict.fromkeys(sentences))

    def identify_calibration(self) -> list[dict[str, str]]:
        """Return everything that the calibration prompts depend on: task names, file hashes."""
        identities = []

        for spec, task in self.calibration.items():
            if task.generator and task.generator.identity:
                identities.append({"name": task.generator.identity, "pool": ""})
                continue

            serving = task.for_split("calibration", whole=spec not in self.evaluation)
            problems = task.pool if serving.calibration_pool is None else serving.calibration_pool

            lines = [f"{each.question}\0{each.gold}\0{each.scorer}" for each in problems]
            pool = "\n".join(lines).encode()
            identities.append({"name": task_name(spec), "pool": hashlib.sha256(pool).hexdigest()})
        return identities


def _refuse_repeats(specs: Sequence[str]) -> None:
    if len(set(specs)) < len(specs):
        twice = f"a task is named twice: {', '.join(specs)}"
        raise UsageError("task-named-twice", twice, remedy="name each task once")


def load(spec: str) -> Task:
    """Load a task by name, by ``name:argument`` if it reads a file, or by ``hub:name``."""
    name, colon, argument = spec.partition(":")
    # A file in place of a task is a common mistake: tell the user how to write it.
    if not colon:
        refuse_table(spec)
        if spec.endswith((".jsonl", ".json")):
            raise UsageError(
                "file-as-task",
                f"{spec} is a file and not a task",
                remedy=f"write --tasks jsonl:{spec}",
            )

    if name == HUB:
        return _load_published(spec, plugins.load("tasks", _find_set(argument)), "")

    module = plugins.load("tasks", name)

    if hasattr(module, "DATASET"):
        if not argument:
            raise _refuse_unsourced(name, module.DATASET)
        return _load_published(spec, module, argument)

    if hasattr(module, "open_generator"):
        return _load_generator(spec, module, argument)
    if hasattr(module, "read"):
        return _load_file(spec, module, argument)

    if colon:
        raise UsageError(
            "takes-no-argument", f"task {name!r} takes no argument", remedy=f"write --tasks {name}"
        )

    return Task(spec, _make_procedural(name, module.draw), (), shares=PROCEDURAL_SHARES)


def _make_procedural(name: str, draw: Callable[[Random], Problem]) -> Generator:
    """Return the generator of a task that draws one problem after the other."""

    def draw_all(split: Split, seed: int) -> Iterator[Problem]:
        random = Random(f"{name}/{split}/{seed}")
        while True:
            yield draw(random)

    return Generator(draw_all)


def _load_file(spec: str, module: ModuleType, argument: str) -> Task:
    """Load a task over a file."""
    if not argument:
        name = spec.removesuffix(":")
        raise UsageError(
            "task-needs-file", f"task {name!r} needs a file", remedy=f"write --tasks {name}:FILE"
        )

    refuse_table(argument)
    pool, repeated = _drop_duplicates(module.read(Path(argument)))
    return Task(spec, None, pool, shares=FILE_SHARES, duplicate_count=repeated)


def _load_generator(spec: str, module: ModuleType, argument: str) -> Task:
    """Load a task whose argument names a generator."""
    if not argument:
        name = spec.removesuffix(":")
        raise UsageError(
            "task-needs-generator",
            f"task {name!r} needs the name of a generator",
            remedy=f"write --tasks {name}:gsm_symbolic",
        )

    generator = module.open_generator(argument)
    task = Task(spec, generator, (), shares=GENERATOR_SHARES)
    task.draw_problems("evaluation", 0, 1)  # refuses what cannot work, before any other work
    return task


def _load_published(spec: str, module: ModuleType, path: str) -> Task:
    """Load a public dataset from a path, or from the Hub if the path is empty."""
    published: PublicDataset = module.DATASET
    evaluation, calibration = read_local(published, Path(path)) if path else read_hub(published)

    problems = _ask_all(module, evaluation, spec)
    pool, repeated = _drop_duplicates(problems)
    for scorer in {problem.scorer for problem in pool}:
        scoring.check(scorer)

    task = Task(spec, None, pool, shares=FILE_SHARES, duplicate_count=repeated, dataset=published)
    if calibration is None:
        return task

    # A few datasets have a question in both splits: it is for evaluation.
    training = _ask_all(module, calibration, spec)
    tested = {problem.question for problem in pool}
    trained, _ = _drop_duplicates([each for each in training if each.question not in tested])
    return replace(task, calibration_pool=trained)


def _ask_all(module: ModuleType, rows: Sequence[Row], spec: str) -> list[Problem]:
    """Return a problem for each row.

    Raises:
        UsageError: a row lacks a column or is not as published.
    """
    published = module.DATASET
    page = f"https://huggingface.co/datasets/{published.evaluation.dataset}"

    problems: list[Problem] = []
    for number, row in enumerate(rows, 1):
        row_name = f"{spec}: row {number}"
        for column in published.columns:
            if row.get(column) in (None, "", []):
                raise UsageError(
                    "missing-column",
                    f"{row_name} has no {column!r}; its columns are {', '.join(row)}",
                    remedy=f"give {published.title} as it was published: {page}",
                )

        try:
            problems.append(module.make_problem(row))
        except UsageError as error:
            error.message = f"{row_name}: {error.message}"
            raise

    return problems


def _drop_duplicates(problems: Sequence[Problem]) -> tuple[tuple[Problem, ...], int]:
    """Return the problems with each question once, and the number of duplicates."""
    problem_by_question = {problem.question: problem for problem in problems}
    return tuple(problem_by_question.values()), len(problems) - len(problem_by_question)


def list_public_tasks() -> plugins.Names:
    """Return the names of the public datasets."""
    return _names_with("DATASET")


def find_protocol(spec: str) -> str:
    """Return the harness and version whose prompt and score a task has; empty for our own."""
    name = task_name(spec)
    if name not in plugins.list_names("tasks"):
        return ""

    published = getattr(plugins.load("tasks", name), "DATASET", None)
    return published.protocol if published else ""


def _find_set(name: str) -> str:
    """Return the name of a public dataset, or refuse it; an id of the Hub gets a hint."""
    known = list_public_tasks()
    for each in known:
        if plugins.load("tasks", each).DATASET.evaluation.dataset.casefold() == name.casefold():
            raise UsageError(
                "dataset-as-task", f"{name} is task {each!r}", remedy=f"write --tasks {HUB}:{each}"
            )

    if name not in known:
        raise UsageError(
            "unknown-public-set",
            f"{name or 'nothing'} is not a public dataset{plugins.suggest(name, known)}",
            remedy=f"known: {', '.join(known)}; your own questions: --tasks jsonl:FILE",
        )
    return name


def _refuse_unsourced(name: str, published: PublicDataset) -> UsageError:
    forms = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
    return UsageError(
        "task-needs-questions",
        f"task {name!r} needs its questions, which racdeploy neither ships nor downloads unasked",
        remedy=f"--tasks {HUB}:{name} reads {published.evaluation.dataset} from the Hub "
        f"({install_command('tasks')}); --tasks {name}:PATH reads your copy of it "
        f"({forms}, or a folder saved by datasets)",
    )


def _refuse_untrained(task: Task) -> UsageError:
    assert task.dataset is not None
    title, name = task.dataset.title, task_name(task.spec)
    others = [each for each in ("math500", "gsm8k") if each != name]
    return UsageError(
        "no-training-questions",
        f"{title} has no training questions to calibrate on: all {len(task.pool)} are for "
        "evaluation",
        remedy=f"add --calibration-tasks {HUB}:{others[0]}, or any other task; "
        f"--tasks {name}:FILE splits a file by a hash of the questions",
    )


def list_procedural_tasks() -> plugins.Names:
    """Return the names of the tasks that draw their problems and need no file."""
    return _names_with("draw")


def _names_with(member: str) -> plugins.Names:
    names = plugins.list_names("tasks")
    return tuple(name for name in names if hasattr(plugins.load("tasks", name), member))


def split_evenly(count: int, tasks: int) -> list[int]:
    """Return how many of ``count`` problems each task gets; the first ones get the remainder."""
    share, rest = divmod(count, tasks)
    return [share + (index < rest) for index in range(tasks)]


def draw_from_tasks(tasks: Sequence[Task], split: Split, seed: int, count: int) -> list[Problem]:
    """Share ``count`` problems evenly among tasks and interleave them."""
    counts = split_evenly(count, len(tasks))
    problems_by_task = [
        task.draw_problems(split, seed, n) for task, n in zip(tasks, counts, strict=True)
    ]

    # Interleaved, so that the first prompts of any number cover every task.
    rows = itertools.zip_longest(*problems_by_task)
    return [problem for row in rows for problem in row if problem is not None]

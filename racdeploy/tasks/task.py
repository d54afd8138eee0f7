"""Tasks: their problems, and the division of problems into splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random
from typing import Literal

from racdeploy.errors import UsageError
from racdeploy.tasks.public_dataset import PublicDataset

Split = Literal["training", "calibration", "evaluation"]
PROCEDURAL_SHARES: dict[Split, tuple[float, float]] = {
    "training": (0.0, 0.6),
    "calibration": (0.6, 0.8),
    "evaluation": (0.8, 1.0),
}
GENERATOR_SHARES: dict[Split, tuple[float, float]] = {
    "training": (0.0, 0.3),
    "calibration": (0.3, 0.6),
    "evaluation": (0.6, 1.0),
}
"""Of generators that may take a second for a problem: fewer are drawn in vain."""
FILE_SHARES: dict[Split, tuple[float, float]] = {
    "training": (0.0, 0.0),
    "calibration": (0.0, 0.5),
    "evaluation": (0.5, 1.0),
}
_MAX_DRAWS_PER_PROBLEM = 1000
HUB = "hub"
"""Prefix of a public dataset's name that is read from the Hub."""


@dataclass(frozen=True)
class Problem:
    """Question with its gold answer."""

    question: str  # the user's message, without a chat template
    gold: str  # the right answer, as its scorer expects it
    thinking: str | None = None  # a worked solution, if the task can write one (training only)
    task: str = ""  # specification of the task, set by :meth:`Task.draw_problems`
    scorer: str = ""  # see :mod:`racdeploy.tasks.scoring`; empty is its default


@dataclass(frozen=True)
class Generator:
    """A source of problems without end.

    Args:
        draw: returns the problems of a split and a seed, always the same ones.
        origin: program that makes them, with its version; empty for a procedural task, which is
            part of racdeploy.
        identity: everything that its problems depend on; empty for a procedural task.
    """

    draw: Callable[[Split, int], Iterator[Problem]]
    origin: str = ""
    identity: str = ""


@dataclass(frozen=True)
class Task:
    """Loaded task."""

    spec: str  # as the user typed it, ``jsonl:FILE`` or a plain name
    generator: Generator | None  # makes problems; None for a task over a file
    pool: tuple[Problem, ...]
    # The part of [0, 1) of each split, for the hashes of questions.
    shares: Mapping[Split, tuple[float, float]] = field(default_factory=dict)
    duplicate_count: int = 0  # problems of a file that repeat another one's question
    dataset: PublicDataset | None = None
    # Problems published for training: the pool is then for evaluation alone. None: a hash splits
    # the pool.
    calibration_pool: tuple[Problem, ...] | None = None

    @property
    def has_calibration(self) -> bool:
        """True if the task has problems for calibration as well as for evaluation."""
        return self.calibration_pool is None or bool(self.calibration_pool)

    def for_split(self, split: Split, *, whole: bool) -> Task:
        """Return the task for one split; with ``whole``, that split gets all problems of a file."""
        if self.generator or not whole:
            return self
        if self.calibration_pool is None:
            return replace(self, shares={split: (0.0, 1.0)})
        if split == "calibration" and not self.calibration_pool:
            return replace(self, calibration_pool=self.pool)
        return self

    def describe(self, *, whole: bool) -> list[str]:
        """Return sentences for the plan: the split of the questions, and the protocol.

        Args:
            whole: one split gets all problems of a file.
        """
        published = self.dataset
        sentences = []

        if self.generator and self.generator.origin:
            sentences.append(f"{self.spec} is drawn and scored by {self.generator.origin}")

        # A public dataset has its own splits, a file is split here.
        if published and self.calibration_pool is not None:
            sentences.append(self._describe_splits(published, self.calibration_pool))
        elif not (self.generator or whole):
            sentences.append(f"{self.spec}: {self.describe_pool()}, split by a hash of each")

        if published:
            sentences.append(f"{published.title} is asked and scored as in {published.protocol}")
        if published and published.caution:
            sentences.append(f"{published.title}: {published.caution}")
        return sentences

    def _describe_splits(self, published: PublicDataset, trained: tuple[Problem, ...]) -> str:
        """Return the sizes and names of the published splits."""
        evaluation, source = published.evaluation, published.calibration

        name = f"{published.title} ({evaluation.split})"
        text = f"{self.spec}: {len(self.pool):,} questions of {name}"
        if source is None or not trained:
            return f"{text}, none for calibration"

        split = f"its {source.split} split"
        if source.dataset != evaluation.dataset:
            split = f"{source.dataset} ({source.split})"

        count = f"{len(trained):,}"
        return f"{text}, calibration on the {count} of {split}"

    def predict_truncation(self, budget: int) -> str:
        """Return a warning if a thinking budget truncates many thoughts of a public dataset.

        Empty if the budget is large enough, or the usual length is unknown.
        """
        if self.dataset is None or budget >= self.dataset.thinking_tokens:
            return ""

        typical = self.dataset.thinking_tokens
        share = "most" if budget < typical / 2 else "about half"
        thoughts = f"{self.dataset.title}'s thoughts"
        return f"{budget:,} tokens cut {share} of {thoughts} (typical: {typical:,})"

    def describe_pool(self) -> str:
        """Return the numbers of questions in a file and in each of its two splits, as text."""
        questions = f"{len(self.pool):,} question{'s' if len(self.pool) > 1 else ''}"
        if self.duplicate_count:
            total = len(self.pool) + self.duplicate_count
            questions += f" ({self.duplicate_count} of its {total} lines repeat another)"

        calibration = self.count_available("calibration")
        evaluation = self.count_available("evaluation")
        return f"{questions}: {calibration} for calibration, {evaluation} for evaluation"

    def count_available(self, split: Split) -> int | None:
        """Return the number of problems in a split of a file, or None if problems are drawn."""
        return None if self.generator else len(self._members(split))

    def draw_problems(self, split: Split, seed: int, count: int) -> list[Problem]:
        """Return ``count`` distinct problems of a split, the same ones for the same seed.

        Raises:
            UsageError: the task has fewer problems.
        """
        if self.generator:
            problems = self._draw_distinct(self.generator.draw(split, seed), split, count)
        else:
            # Shuffled: a random subset, as the first questions of a file are often easier.
            problems = self._members(split)
            Random(f"{task_name(self.spec)}/{split}/{seed}").shuffle(problems)

        if len(problems) < count:
            raise UsageError(
                "too-few-problems",
                f"task {self.spec!r} has {len(problems)} {split} problems, {count} were asked for",
                remedy="ask for fewer prompts in the recipe, or give a task with more problems",
            )

        return [replace(problem, task=self.spec) for problem in problems[:count]]

    def _draw_distinct(self, drawn: Iterator[Problem], split: Split, count: int) -> list[Problem]:
        """Draw until ``count`` different questions of the split are found, or give up."""
        problem_by_question: dict[str, Problem] = {}
        for problem in islice(drawn, count * _MAX_DRAWS_PER_PROBLEM):
            if self._is_in_split(split, problem):
                problem_by_question.setdefault(problem.question, problem)
            if len(problem_by_question) == count:
                break

        return [*problem_by_question.values()]

    def _members(self, split: Split) -> list[Problem]:
        """Return the problems of a file that belong to a split."""
        if self.calibration_pool is not None:
            pools = {"evaluation": self.pool, "calibration": self.calibration_pool}
            return [*pools.get(split, ())]
        return [problem for problem in self.pool if self._is_in_split(split, problem)]

    def _is_in_split(self, split: Split, problem: Problem) -> bool:
        low, high = self.shares[split]
        return low <= hash_to_unit(problem.question) < high


def task_name(spec: str) -> str:
    """Return the name of the plugin in a specification: ``gsm8k`` for ``hub:gsm8k``."""
    name, _, argument = spec.partition(":")
    return argument if name == HUB else name


def hash_to_unit(question: str) -> float:
    """Return a number in [0, 1) for a question, which depends on its text alone."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

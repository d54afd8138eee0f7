"""A task: its problems, and which of them each split gets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from racdeploy.errors import UsageError
from racdeploy.tasks.published import Published

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
HUB = "hub"
"""In front of a public set's name: read it from the Hub."""


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer."""

    question: str  # what the user asks, without a chat template
    gold: str  # the right answer, as its scorer expects it
    thinking: str | None = None  # a worked solution, where the task can write one (training only)
    task: str = ""  # the task's specification, filled in by :meth:`Task.problems`
    scorer: str = ""  # of :mod:`racdeploy.tasks.scoring`; empty is its default


@dataclass(frozen=True)
class Task:
    """A loaded task."""

    spec: str  # what the user typed, ``jsonl:FILE`` or a plain name
    draw: Callable[[Random], Problem] | None  # makes a problem; None for a task over a file
    pool: tuple[Problem, ...]
    # Which part of all questions, by their hash, each split gets.
    shares: Mapping[Split, tuple[float, float]] = field(default_factory=dict)
    repeated: int = 0  # problems of a file whose question another one has, too
    published: Published | None = None
    # Problems published for training, so that the pool is for evaluation alone; None: a hash
    # splits the pool.
    trained: tuple[Problem, ...] | None = None

    @property
    def calibrates(self) -> bool:
        """Whether it has problems for calibration beside those for evaluation."""
        return self.trained is None or bool(self.trained)

    def serving(self, split: Split, *, whole: bool) -> Task:
        """Return the task for one split; with ``whole``, a file gives that split all it has."""
        if self.draw or not whole:
            return self
        if self.trained is None:
            return replace(self, shares={split: (0.0, 1.0)})
        if split == "calibration" and not self.trained:
            return replace(self, trained=self.pool)
        return self

    def describe(self, *, whole: bool) -> list[str]:
        """Return what a plan says of the questions: how they are split, whom the prompt follows.

        Args:
            whole: one split gets all that a file has.
        """
        published = self.published
        told = []

        # A public set has its own splits, one file is split here.
        if published and self.trained is not None:
            told.append(self._describe_splits(published, self.trained))
        elif not (self.draw or whole):
            told.append(f"{self.spec}: {self.describe_pool()}, as a hash of each decides")

        if published:
            told.append(f"{published.title} is asked and scored as in {published.follows}")
        if published and published.caution:
            told.append(f"{published.title}: {published.caution}")
        return told

    def _describe_splits(self, published: Published, trained: tuple[Problem, ...]) -> str:
        asked, source = published.evaluation, published.calibration

        name = f"{published.title} ({asked.split})"
        said = f"{self.spec}: {len(self.pool):,} questions of {name}"
        if source is None or not trained:
            return f"{said}, none for calibration"

        place = f"its {source.split} split"
        if source.dataset != asked.dataset:
            place = f"{source.dataset} ({source.split})"

        count = f"{len(trained):,}"
        return f"{said}, calibration on the {count} of {place}"

    def foresee_cut(self, budget: int) -> str:
        """Return what so many tokens usually cut of a public set's thoughts, or an empty string."""
        if self.published is None or budget >= self.published.thinking_tokens:
            return ""

        typical = self.published.thinking_tokens
        share = "most" if budget < typical / 2 else "about half"
        thoughts = f"{self.published.title}'s thoughts"
        return f"{budget:,} tokens cut {share} of {thoughts} (typical: {typical:,})"

    def describe_pool(self) -> str:
        """Return how many questions a file has, and how many of them each half got."""
        questions = f"{len(self.pool):,} question{'s' if len(self.pool) > 1 else ''}"
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
        random = Random(f"{name_of(self.spec)}/{split}/{seed}")
        if self.draw:
            found = self._draw_distinct(self.draw, random, split, count)
        else:
            found = self._members(split)
            random.shuffle(found)

        if len(found) < count:
            raise UsageError(
                "too-few-problems",
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
        if self.trained is not None:
            apart = {"evaluation": self.pool, "calibration": self.trained}
            return [*apart.get(split, ())]
        return [problem for problem in self.pool if self._serves(split, problem)]

    def _serves(self, split: Split, problem: Problem) -> bool:
        low, high = self.shares[split]
        return low <= split_share(problem.question) < high


def name_of(spec: str) -> str:
    """Return the name of the plugin that a specification asks for."""
    name, _, argument = spec.partition(":")
    return argument if name == HUB else name


def split_share(question: str) -> float:
    """Return the place of a question in [0, 1), decided by a hash of its text alone."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

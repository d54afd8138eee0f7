"""The strategy of a build: the models that it makes until one is shipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from racdeploy.pipeline.build import Build
from racdeploy.pipeline.ladder import Ladder
from racdeploy.pipeline.structure import list_cut_costs
from racdeploy.pipeline.workspace import notify
from racdeploy.results.plan import Plan
from racdeploy.results.report import Report


class Strategy(Protocol):
    """A way to a bundle; ``out`` is its folder, by default the artifact's name."""

    def run(self, out: Path | None = None) -> tuple[Path, Report]:
        """Build, verify and write a bundle; return its folder and its report."""

    def plan(self, out: Path | None = None) -> Plan:
        """Return the plan; raise the first error that a stage would raise."""


@dataclass(frozen=True)
class OneModel:
    """The strategy of a recipe that names what is pruned or stored: that model is shipped."""

    build: Build

    def run(self, out: Path | None = None) -> tuple[Path, Report]:
        """Build, verify and write a bundle; return its folder and its report."""
        for cost in list_cut_costs(self.build.job):
            notify(cost)
        return self.build.run(out)

    def plan(self, out: Path | None = None) -> Plan:
        """Return the plan; raise the first error that a stage would raise."""
        build = self.build.with_answer_limit()
        return build.plan(build.check(out))


def choose_strategy(build: Build) -> Strategy:
    """Return the ladder if the recipe has rungs, as by default, and otherwise its one model."""
    if build.job.recipe.rungs:
        return Ladder(build)
    return OneModel(build)

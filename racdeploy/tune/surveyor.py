"""What a candidate changes, predicted from one survey of the dense model; and mixes found in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from racdeploy.errors import UsageError
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.options_stage import OptionsStage
from racdeploy.prune.surveyed import Option, Surveyed
from racdeploy.report.tables import readable_bytes
from racdeploy.report.tuning import Wishes
from racdeploy.traces.trace import Trace
from racdeploy.tune import mix
from racdeploy.tune.blends import BLENDS
from racdeploy.tune.candidates import Choice, make_choice
from racdeploy.tune.entries import Entry
from racdeploy.tune.predictor import Predictor

_WITHOUT_LIMIT = ("q4_k_m", "q3_k_m")
"""Presets whose bytes a mix gets where no limit says how many there are."""


@dataclass(frozen=True)
class Surveyor:
    """Asks the dense model of a build once, for all candidates."""

    build: Build
    predictor: Predictor
    mixed: dict[str, float] = field(default_factory=dict)  # errors of mixes, by name
    errors: dict[tuple[Any, ...], dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        return self.build.job

    def survey(self, entries: Sequence[Entry], calibration: Sequence[Trace]) -> Surveyed:
        """Return what each way to store a linear changes, of all that candidates have."""
        options: dict[str, None] = {}
        parts: dict[str, None] = {}

        for entry in entries:
            choice = entry.choice
            for name in self.predictor.list_formats(choice):
                options[_name_option(choice, name)] = None
            if choice.recipe.structure.share("ffn") < 1:
                parts["ffn"] = None

        recipe = self.job.recipe
        stage = OptionsStage(
            self.build.place,
            self.job.checkpoint,
            recipe.calibration,
            recipe.prune,
            tuple(options),
            tuple(parts),
            recipe.tune.survey_tokens,
        )
        return stage.run(calibration)

    def predict_error(self, choice: Choice, surveyed: Surveyed) -> float:
        """Return the sum over all linears of what a candidate changes at the ends of the blocks.

        It is infinite where a number format could not hold a linear.
        """
        if choice.name in self.mixed:
            return self.mixed[choice.name]
        cut = _predict_cut(choice, surveyed)
        plan = self.predictor.size(choice).tensors
        if not plan:  # of a graph, which another program writes
            option = _name_option(choice, choice.recipe.export.quant)
            return cut + surveyed.total(option)

        errors = self._list_errors(plan, surveyed)
        error = cut

        for tensor in plan:
            found = errors[tensor.name]
            key = _name_option(choice, tensor.quant_real)
            plain = Option(tensor.quant_real).key  # of what gets no zeros, as the embedding

            unknown = math.inf if found else 0.0
            error += found.get(key, found.get(plain, unknown))

        return error

    def _list_errors(
        self, plan: Sequence[PlannedTensor], surveyed: Surveyed
    ) -> dict[str, dict[str, float]]:
        """Return tensor → what each way to store it changes; files of one shape share them."""
        shape = tuple((tensor.name, tensor.shape) for tensor in plan)
        if shape not in self.errors:
            self.errors[shape] = mix.list_errors(self.job.checkpoint, plan, surveyed)
        return self.errors[shape]

    def propose_mixes(
        self, surveyed: Surveyed, wishes: Wishes, entries: Sequence[Entry]
    ) -> Iterator[Choice]:
        """Yield mixes of number formats that use the bytes there are as well as is possible."""
        if self.job.recipe.export.format != "gguf":
            return  # other formats name no tensors

        plan = mix.plan(self.job.checkpoint)
        beside = self._count_beside(entries)
        budgets = _list_budgets(wishes, entries)

        for blend, budget in product(BLENDS, budgets):
            if blend.zeros and self.job.recipe.prune.dense:
                continue  # which linears may have none is not in the survey

            ways = mix.list_ways(
                self.job.checkpoint,
                plan,
                surveyed,
                blend.size,
                blend.allows,
            )
            try:
                found = mix.choose(ways, budget - beside)
                if blend.zeros and not any(found.zeros(plan).values()):
                    continue  # it is another kind's

                settings = blend.settings(found, plan, surveyed)
                name = blend.name.format(readable_bytes(budget))
                self.mixed[name] = found.error
                yield make_choice(self.job, name, blend.kind, settings)
            except UsageError:  # not even the smallest formats fit
                continue

    def _count_beside(self, entries: Sequence[Entry]) -> int:
        """Return the bytes of a file beside its tensors."""
        plain = next(entry for entry in entries if entry.choice.kind == "dense")
        size = self.predictor.size(plain.choice)

        tensor_bytes = 0
        for tensor in size.tensors:
            option = Option(tensor.quant_real)
            tensor_bytes += mix.plain_bytes(tensor, option)
        return size.size_bytes - tensor_bytes


def _predict_cut(choice: Choice, surveyed: Surveyed) -> float:
    """Return what a cut of the feed-forward part changes, as if all blocks lost alike."""
    share = choice.recipe.structure.share("ffn")
    error = 0.0
    if share == 1:
        return error

    for curve in surveyed.widths.get("ffn", []):
        wanted = share * max(curve)
        nearest = min(curve, key=lambda units: abs(units - wanted))
        error += curve[nearest]
    return error


def _list_budgets(wishes: Wishes, entries: Sequence[Entry]) -> list[int]:
    """Return for how many bytes mixes are looked for."""
    if wishes.max_bytes:
        return [wishes.max_bytes]

    known = [entry for entry in entries if entry.name in _WITHOUT_LIMIT]
    if not known:
        plain = [entry for entry in entries if entry.choice.kind == "dense"]
        known = plain[len(plain) // 2 : len(plain) // 2 + 1]
    return [entry.takes.size_bytes for entry in known]


def _name_option(choice: Choice, quant_name: str) -> str:
    """Return the key of how a candidate stores a linear in a number format.

    Codes that are chosen change less than rounded ones, and take many times as long to try: they
    are predicted as rounded, and have a kind of their own.
    """
    prune = choice.recipe.prune
    pattern = prune.pattern if prune.kept_of else ""
    return Option(quant_name, prune.sparsity, pattern).key

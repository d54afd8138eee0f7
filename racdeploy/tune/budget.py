"""The time that a search may take: what its stages take at least, and what each may still use.

A plain estimate decides the plan, by operations and bytes over round figures. Once something has
been measured, what is left is expected to be as much slower as that was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.forecast import count_active_weights
from racdeploy.pipeline.job import Job
from racdeploy.tasks import share_evenly
from racdeploy.traces.trace import Trace
from racdeploy.tune.race import FIRST_ROUND
from racdeploy.tune.speed import MAX_SECONDS

LEAST_MADE = 2  # candidates, a dense one and a pruned one, however short the time
LEAST_HELD_OUT = 4  # traces: fewer say too little about the distance from the dense model
_MAX_COMPARED = 16  # held-out traces
_FLOPS = 2e10  # a second and core, of matrix products of any kind
_TORCH_PASS_S = 2e-3  # of one block and step, beside its products
_ROUNDED = 5e6  # weights a second whose codes an export chooses
_STARTING_S = 10.0  # of torch and of engines, for each stage
_CODE_SWEEPS = 10  # over all columns, while codes are chosen
_USUAL_SHARE = 0.25  # of the longest answer that may be given, while no answer is known
_MORE_PROMPTS = 64  # than twice as many are not looked for
_SPARE = 1.15  # of what the verification is expected to take


@dataclass
class Budget:
    """Seconds that are left, by the seconds that stages are expected to take, in their order."""

    budget_s: float
    expected_s: dict[str, float] = field(default_factory=dict)
    now: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    pace: float = 1.0  # how many times as long as expected it takes

    def __post_init__(self) -> None:
        self._began = self.now()

    @property
    def elapsed_s(self) -> float:
        return self.now() - self._began

    def left_s(self, stage: str) -> float:
        """Return the seconds that a stage has left, without those that later ones need."""
        names = list(self.expected_s)
        later = names[names.index(stage) + 1 :]
        reserved = _SPARE * sum(self.expected_s[name] for name in later)
        return self.budget_s - self.elapsed_s - self.pace * reserved

    def learn(self, stage: str, seconds: float) -> None:
        """Take what the least of a stage took: nothing is expected to be faster than planned."""
        if expected := self.expected_s.get(stage):
            self.pace = max(self.pace, seconds / expected)

    def check(self) -> None:
        """Refuse a budget below what the stages take at least.

        Raises:
            UsageError: it names that time.
        """
        least_s = sum(self.expected_s.values())
        if least_s <= self.budget_s:
            return
        minutes = math.ceil(least_s / 60)
        raise UsageError(
            "budget-too-small",
            f"a search takes about {minutes} min at least here, and the budget is "
            f"{self.budget_s / 60:.3g} min",
            remedy=f"--budget {minutes}m; or fewer --trace-prompts and --prompts",
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count how long a stage takes."""
        began = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began


@dataclass(frozen=True)
class _Effort:
    """What this machine takes for work on a model; ``tokens`` are those of an answer."""

    tokens: float
    token_flops: float
    flops_per_s: float

    def answer_s(self, prompts: int, step_s: float, together: int) -> float:
        """Return the seconds of so many answers, some of them decoded together."""
        products_s = prompts * self.tokens * self.token_flops / self.flops_per_s
        steps = math.ceil(prompts / together) * self.tokens
        return products_s + steps * step_s

    def compare_s(self, models: int, compared: int) -> float:
        """Return the seconds of the logits of so many traces, by so many models."""
        tokens = min(compared, _MAX_COMPARED) * self.tokens
        return models * tokens * self.token_flops / self.flops_per_s


def estimate_least(
    job: Job, token_s: float, cores: int, traces: Sequence[Trace], *, measures: bool
) -> dict[str, float]:
    """Return about the seconds that each stage of the shortest search takes, in their order.

    Args:
        token_s: that the engine takes for a token of the dense model.
        traces: those that are there already.
        measures: whether the device has yet to be measured.
    """
    recipe = job.recipe
    checkpoint = job.checkpoint
    tokens = _USUAL_SHARE * recipe.traces.max_new_tokens
    if traces:
        tokens = sum(len(trace.completion_ids) for trace in traces) / len(traces)
    tokens = min(tokens, recipe.verify.max_new_tokens)
    effort = _Effort(tokens, 2.0 * count_active_weights(checkpoint), _FLOPS * cores)

    prompts = len(job.problems("calibration"))
    traces_s = 0.0
    if not (traces or recipe.traces.server):
        step_s = _TORCH_PASS_S * checkpoint.shape.block_count
        step_s += effort.token_flops / effort.flops_per_s
        traces_s = _STARTING_S + effort.answer_s(prompts, step_s, recipe.traces.batch)

    calibrated = min(recipe.calibration.max_tokens or math.inf, prompts * tokens)
    held_out = round(recipe.calibration.held_out_share * prompts)
    made_s = _walk_flops(checkpoint, calibrated) / effort.flops_per_s
    made_s += count_active_weights(checkpoint) / (_ROUNDED * cores)
    compared_s = effort.compare_s(1 + LEAST_MADE, held_out)

    parallel = recipe.verify.parallel
    asked = len(job.problems("evaluation")) * recipe.verify.samples
    models = 3 + len(recipe.verify.controls)  # dense, the winner and its rival
    verified_s = models * effort.answer_s(asked, token_s, parallel)
    verified_s += effort.compare_s(3, recipe.verify.logit_traces)

    return {
        "traces": traces_s,
        "measure": MAX_SECONDS / 2 if measures else 0.0,
        "compare": _STARTING_S + LEAST_MADE * made_s + compared_s,
        "race": _STARTING_S + 3 * effort.answer_s(FIRST_ROUND, token_s, parallel),
        "verify": 2 * _STARTING_S + verified_s,
    }


def _walk_flops(checkpoint: Checkpoint, tokens: float) -> float:
    """Return the operations of one walk over all blocks in which codes are chosen."""
    flops = 6.0 * tokens * count_active_weights(checkpoint)
    for name in checkpoint.shape.linear_weights:
        *_, rows, inputs = checkpoint.entries[name].shape
        flops += (tokens + 2 * _CODE_SWEEPS * rows + 4 * inputs) * inputs**2
    return flops


def check_held_out(job: Job) -> None:
    """Refuse so few calibration prompts that hardly a trace would be held out.

    Raises:
        UsageError: it names the number that is needed.
    """
    asked = len(job.problems("calibration"))
    share = job.recipe.calibration.held_out_share
    tasks = len(job.tasks.calibration)

    def is_enough(count: int) -> bool:
        return sum(round(share * own) for own in share_evenly(count, tasks)) >= LEAST_HELD_OUT

    if is_enough(asked):
        return
    needed = next(filter(is_enough, range(asked + 1, 2 * asked + _MORE_PROMPTS)), 0)
    remedy = f"--trace-prompts {needed} at least" if needed else "raise calibration.held_out_share"
    raise UsageError(
        "too-few-held-out",
        f"of {asked} calibration prompts fewer than {LEAST_HELD_OUT} traces are held out, "
        "too few to compare candidates",
        remedy=remedy,
    )

"""Time budget of a search: the minimum time of its stages, and the time each has left.

The plan uses rough estimates: operations and bytes over round rates. If a stage turns out slower
than estimated, the later ones are expected to be slower by the same factor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.forecast import count_active_weights
from racdeploy.pipeline.job import Job
from racdeploy.tasks import split_evenly
from racdeploy.traces.trace import Trace
from racdeploy.tuning.race import FIRST_ROUND_PROMPTS
from racdeploy.tuning.speed import MAX_SECONDS

MIN_BUILT = 2  # candidates: a dense one and a pruned one, however short the time
MIN_HELD_OUT = 4  # traces: fewer give no usable KL
_MAX_COMPARED = 16  # held-out traces
_FLOPS = 2e10  # per second and core, of matrix products
_TORCH_BLOCK_S = 2e-3  # overhead of a block in a decoding step under torch
_QUANTIZED_PER_S = 5e6  # weights per second and core in an export
_STARTUP_S = 10.0  # of torch and engines, per stage
_CODE_SWEEPS = 10  # over all columns, of optimized rounding
_USUAL_SHARE = 0.25  # of the maximum length, for answers while none is known
_SEARCHED_PROMPTS = 64  # beyond twice as many, for a number that is enough
_RESERVE = 1.15  # of the time that later stages are expected to take


@dataclass
class Budget:
    """Remaining time; ``expected_s`` has the expected seconds of the stages, in order."""

    budget_s: float
    expected_s: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    pace: float = 1.0  # real over expected time, of the slowest stage so far

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def remaining_s(self, stage: str) -> float:
        """Return the seconds left for a stage, after a reserve for the later ones."""
        names = list(self.expected_s)
        later = names[names.index(stage) + 1 :]
        reserved = _RESERVE * sum(self.expected_s[name] for name in later)
        return self.budget_s - self.elapsed_s - self.pace * reserved

    def update_pace(self, stage: str, seconds: float) -> None:
        """Raise the pace if a stage was slower than expected; it never falls below 1."""
        if expected := self.expected_s.get(stage):
            self.pace = max(self.pace, seconds / expected)

    def check(self) -> None:
        """Check that the budget covers the minimum time of all stages.

        Raises:
            UsageError: it does not; the message has that time.
        """
        min_s = sum(self.expected_s.values())
        if min_s <= self.budget_s:
            return
        minutes = math.ceil(min_s / 60)
        raise UsageError(
            "budget-too-small",
            f"a search takes at least about {minutes} min here, and the budget is "
            f"{self.budget_s / 60:.3g} min",
            remedy=f"--budget {minutes}m; or fewer --trace-prompts and --prompts",
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the ``with`` body to a stage's seconds."""
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


@dataclass(frozen=True)
class _Effort:
    """Time model of this machine; ``tokens`` are the length of an answer."""

    tokens: float
    token_flops: float
    flops_per_s: float

    def answer_s(self, prompts: int, step_s: float, together: int) -> float:
        """Return the seconds of answering ``prompts``, with ``together`` sequences per batch."""
        products_s = prompts * self.tokens * self.token_flops / self.flops_per_s
        steps = math.ceil(prompts / together) * self.tokens
        return products_s + steps * step_s

    def compare_s(self, models: int, compared: int) -> float:
        """Return the seconds of computing the logits of ``compared`` traces with some models."""
        tokens = min(compared, _MAX_COMPARED) * self.tokens
        return models * tokens * self.token_flops / self.flops_per_s


def estimate_min_seconds(
    job: Job, token_s: float, cores: int, traces: Sequence[Trace], *, measures_device: bool
) -> dict[str, float]:
    """Estimate the seconds of each stage of the shortest possible search, in order.

    Args:
        token_s: of decoding a token of the dense model.
        traces: that exist already; empty if they must be collected.
        measures_device: the device must be measured, too.
    """
    recipe = job.recipe
    checkpoint = job.checkpoint
    tokens = _USUAL_SHARE * job.trace_limit
    if traces:
        tokens = sum(len(trace.completion_ids) for trace in traces) / len(traces)
    tokens = min(tokens, job.verification.max_new_tokens)
    effort = _Effort(tokens, 2.0 * count_active_weights(checkpoint), _FLOPS * cores)

    # Collecting traces: answers decoded under torch, unless they exist or a server gives them.
    prompts = len(job.problems("calibration"))
    traces_s = 0.0
    if not (traces or recipe.traces.server):
        step_s = _TORCH_BLOCK_S * checkpoint.shape.block_count
        step_s += effort.token_flops / effort.flops_per_s
        traces_s = _STARTUP_S + effort.answer_s(prompts, step_s, recipe.traces.batch_size)

    calibrated = min(recipe.calibration.max_tokens or math.inf, prompts * tokens)
    held_out = round(recipe.calibration.held_out_share * prompts)
    # Pruning runs calibration tokens through all blocks; an export quantizes all weights.
    made_s = _walk_flops(checkpoint, calibrated) / effort.flops_per_s
    made_s += count_active_weights(checkpoint) / (_QUANTIZED_PER_S * cores)
    compared_s = effort.compare_s(1 + MIN_BUILT, held_out)

    parallel = recipe.verify.parallel
    answers = len(job.problems("evaluation")) * recipe.verify.samples
    models = 3 + len(recipe.verify.controls)  # dense, the winner and its rival
    verified_s = models * effort.answer_s(answers, token_s, parallel)
    verified_s += effort.compare_s(3, recipe.verify.logit_traces)

    return {
        "traces": traces_s,
        "measure": MAX_SECONDS / 2 if measures_device else 0.0,
        "compare": _STARTUP_S + MIN_BUILT * made_s + compared_s,
        "race": _STARTUP_S + 3 * effort.answer_s(FIRST_ROUND_PROMPTS, token_s, parallel),
        "verify": 2 * _STARTUP_S + verified_s,
    }


def _walk_flops(checkpoint: Checkpoint, tokens: float) -> float:
    """Return the FLOPs of pruning all blocks with optimized rounding.

    Per linear: its Hessian, a quadratic number of operations per row and sweep, and the Hessian's
    factorization.
    """
    flops = 6.0 * tokens * count_active_weights(checkpoint)
    for name in checkpoint.shape.prunable_weights:
        *_, rows, inputs = checkpoint.entries[name].shape
        flops += (tokens + 2 * _CODE_SWEEPS * rows + 4 * inputs) * inputs**2
    return flops


def check_held_out(job: Job) -> None:
    """Check that the calibration prompts leave enough held-out traces.

    Raises:
        UsageError: they do not; the message has the number of prompts that is needed.
    """
    prompts = len(job.problems("calibration"))
    share = job.recipe.calibration.held_out_share
    tasks = len(job.tasks.calibration)

    def is_enough(count: int) -> bool:
        """Return True if ``count`` prompts, shared evenly among the tasks, leave enough traces."""
        return sum(round(share * n) for n in split_evenly(count, tasks)) >= MIN_HELD_OUT

    if is_enough(prompts):
        return
    needed = next(filter(is_enough, range(prompts + 1, 2 * prompts + _SEARCHED_PROMPTS)), 0)
    remedy = f"--trace-prompts {needed} at least" if needed else "raise calibration.held_out_share"
    raise UsageError(
        "too-few-held-out",
        f"of {prompts} calibration prompts fewer than {MIN_HELD_OUT} traces are held out, "
        "too few to compare candidates",
        remedy=remedy,
    )

"""A rough time for a build: the weights that each token meets, over the speed of the processor."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expert_of
from racdeploy.pipeline.job import Job
from racdeploy.processes.cores import available_cores
from racdeploy.traces.trace import Trace

_WIDTH = 768  # of matrices that fill every core and fit its cache
_SHARE_OF_SPEED = 0.5  # of one large product's, that torch and llama.cpp reach
_READ_BYTES_PER_S = 15e9  # from memory, which the cores share
_PASS_S = 1e-3  # of a token through a block, beside its products
_PRUNE_PASSES, _RECOVER_PASSES = 6, 6  # sums of squares, and the backward pass, among them
_SOLVE_SWEEPS = 50  # of a weight over all inputs of its row


def estimate_seconds(
    job: Job, plan: Mapping[str, Any], traces: Sequence[Trace], threads: int
) -> float | None:
    """Return about how long a build of that plan takes; None where a GPU may do it.

    Without ``traces``, every answer is at its longest. ``threads`` of 0 are all cores.
    """
    if shutil.which("nvidia-smi"):
        return None

    recipe, checkpoint = job.recipe, job.checkpoint
    cores = min(threads or available_cores(), available_cores())
    speed = _SHARE_OF_SPEED * _measure_flops_per_s() * cores / available_cores()
    token_s = 2 * count_active_weights(checkpoint) / speed

    lengths = [len(trace.completion_ids) for trace in traces] or [recipe.traces.max_new_tokens]
    usual = sum(lengths) / len(lengths)

    def answer_s(prompts: int, together: int, read_bytes: float) -> float:
        step_s = max(together * token_s, read_bytes / _READ_BYTES_PER_S)
        steps = math.ceil(prompts / together) * usual
        return steps * (step_s + _PASS_S * checkpoint.shape.block_count)

    batch = 1 if checkpoint.family.has_state else recipe.traces.batch
    read_bytes = 2 * token_s * speed  # in float32
    tracing_s = answer_s(len(job.problems("calibration")), batch, read_bytes)

    tokens = plan.get("prune_tokens", plan.get("prune_tokens_at_most", 0))
    sweeps = _SOLVE_SWEEPS * checkpoint.shape.hidden_size
    pruning_s = token_s * (_PRUNE_PASSES * tokens + sweeps)

    seconds: float = pruning_s + token_s * _RECOVER_PASSES * recipe.recover.tokens
    seconds += 0 if traces or recipe.traces.server else tracing_s

    if "evaluation_models" in plan:
        prompts = len(job.problems("evaluation")) * recipe.verify.samples
        answers_s = answer_s(prompts, recipe.verify.parallel, plan["artifact_bytes"])
        seconds += plan["evaluation_models"] * answers_s

    return seconds


def count_active_weights(checkpoint: Checkpoint) -> int:
    """Return the weights that one token meets; of experts, those it is sent to."""
    shape = checkpoint.shape
    active = shape.vocab_size * shape.hidden_size
    for name in shape.linear_weights:
        size = checkpoint.entries[name].size
        if expert_of(name) is not None:
            size = size * shape.integer("num_experts_per_tok") // shape.num_experts
        active += size
    return active


def _measure_flops_per_s() -> float:
    """Return the speed of the best of three products of matrices, on all cores."""
    matrix = np.ones((_WIDTH, _WIDTH), np.float32)
    best_s = math.inf
    for _ in range(3):
        began = time.perf_counter()
        matrix @ matrix
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * _WIDTH**3 / best_s

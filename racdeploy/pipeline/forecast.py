"""Rough estimate of a build's time: weights per token, over the speed of the processor."""

from __future__ import annotations

import math
import shutil
import timeit
from collections.abc import Sequence
from itertools import compress
from statistics import fmean

import numpy as np

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.processes.cores import available_cores
from racdeploy.results.plan import Plan
from racdeploy.traces.trace import Trace

_MATRIX_WIDTH = 768  # such matrices keep every core busy and fit its cache
_REACHED_SHARE = 0.5  # of a large product's speed, that torch and llama.cpp reach
_READ_BYTES_PER_S = 15e9  # from memory, which the cores share
_BLOCK_OVERHEAD_S = 1e-3  # per token and block, beside its products
# Of their maximum length, before there are traces: tokens are at most 1.5 times off if these have
# between 4/9 of it and all.
_EXPECTED_SHARE = 2 / 3
_PASSES = 6  # of pruning with the Hessians, and of recovery with the backward pass
_SOLVE_SWEEPS = 50  # of a weight over all inputs of its row


def estimate_seconds(
    job: Job, plan: Plan, traces: Sequence[Trace], threads: int
) -> dict[str, float]:
    """Return about how many seconds each stage of a build takes; empty if there may be a GPU.

    Without ``traces``, an answer counts with two thirds of the maximum length. 0 ``threads`` are
    all cores.
    """
    if shutil.which("nvidia-smi"):
        return {}

    recipe, checkpoint = job.recipe, job.checkpoint
    cores = min(threads or available_cores(), available_cores())
    speed = _REACHED_SHARE * _measure_flops_per_s() * cores / available_cores()
    weights_s = 2 * count_active_weights(checkpoint) / speed

    lengths = [len(trace.completion_ids) for trace in traces]
    mean_length = fmean(lengths or [_EXPECTED_SHARE * recipe.traces.max_new_tokens])

    # Two products of a query with the half of the sequence that is before it.
    shape = checkpoint.shape
    heads = sum(compress(shape.widths["num_attention_heads"], shape.attends))
    attention_s = 2 * heads * shape.head_dim / speed
    token_s = weights_s + attention_s * mean_length

    def answer_s(prompts: int, length: float, together: int, read_bytes: float) -> float:
        # A step is bound by arithmetic, or by reading all weights from memory once.
        step_s = max(together * (weights_s + attention_s * length), read_bytes / _READ_BYTES_PER_S)
        steps = math.ceil(prompts / together) * length
        return steps * (step_s + _BLOCK_OVERHEAD_S * shape.block_count)

    seconds = {}
    batch = 1 if checkpoint.family.has_state else recipe.traces.batch_size
    sampling = mean_length, batch, 2 * weights_s * speed  # read in float32
    if not (traces or recipe.traces.server):
        seconds["trace"] = answer_s(len(job.problems("calibration")), *sampling)

    # Of all answers to a prompt at most two are learned, twice.
    answers = plan.recovery.shorten_answers_at_most if plan.recovery else 0
    learned = recipe.recover.tokens + 4 * answers / recipe.recover.samples * mean_length
    seconds["recover"] = token_s * _PASSES * learned + answer_s(answers, *sampling)

    # Artifacts of different codes are different models; pruning does not reach the head.
    tokens = 0.0
    if plan.pruning:
        expected_share = _EXPECTED_SHARE if plan.pruning.is_bound else 1
        tokens = expected_share * plan.pruning.prune_tokens
    models = {str(each.rounding_quants) for each in (job, *job.siblings)}
    head_s = 2 * shape.vocab_size * shape.hidden_size / speed
    sweeps_s = (weights_s - head_s) * _SOLVE_SWEEPS * shape.hidden_size
    seconds["prune"] = len(models) * ((token_s - head_s) * _PASSES * tokens + sweeps_s)

    if plan.artifact:
        prompts = len(job.problems("evaluation")) * recipe.verify.samples
        length = min(mean_length, recipe.verify.max_new_tokens)
        seconds["verify"] = plan.artifact.evaluation_models * answer_s(
            prompts, length, recipe.verify.parallel, plan.artifact.artifact_bytes
        )

    return seconds


def count_active_weights(checkpoint: Checkpoint) -> int:
    """Return the number of weights that compute one token; of experts, only its own."""
    shape = checkpoint.shape
    active = shape.vocab_size * shape.hidden_size
    for name in shape.prunable_weights:
        active += round(checkpoint.entries[name].size * shape.active_share(name))
    return active


def _measure_flops_per_s() -> float:
    """Return the speed of the fastest of twenty matrix products, on all cores."""
    matrix = np.ones((_MATRIX_WIDTH, _MATRIX_WIDTH), np.float32)
    # The machine may be busy at times.
    best_s = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=20))
    return 2 * _MATRIX_WIDTH**3 / best_s

"""Rough estimate of a build's time: weights per token, over the speed of the processor."""

from __future__ import annotations

import math
import shutil
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from statistics import fmean

import numpy as np

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.pipeline.job import Job
from racdeploy.processes.cores import available_cores
from racdeploy.results.plan import Plan
from racdeploy.traces import own_text
from racdeploy.traces.trace import Trace

_MATRIX_WIDTH = 768  # such matrices keep every core busy and fit its cache
_REACHED_SHARE = 0.5  # of a large product's speed, that torch and llama.cpp reach
_READ_BYTES_PER_S = 15e9  # from memory, which the cores share
_BLOCK_OVERHEAD_S = 1e-3  # per token and block, beside its products
# Of their maximum length, before there are traces: tokens are at most 1.5 times off if these have
# between 4/9 of it and all.
_EXPECTED_SHARE = 2 / 3
_PASSES = 6  # of pruning with the Hessians, and of recovery with the backward pass
_BFLOAT16_PASSES = 4  # of pruning: the four forward passes take half as long, the Hessians as long
_SOLVE_SWEEPS = 50  # of a weight over all inputs of its row


def estimate_seconds(
    job: Job, plan: Plan, traces: Sequence[Trace], threads: int
) -> dict[str, float]:
    """Return about how many seconds each stage of a build takes; empty if there may be a GPU.

    0 ``threads`` are all cores.
    """
    if shutil.which("nvidia-smi"):
        return {}

    recipe = job.recipe
    pace = _Pace.measure(job.checkpoint, threads)
    mean_length = expect_answer_tokens(job, traces)

    def sampling_s(prompts: int, length: float = mean_length) -> float:
        # Under torch, which reads the weights in float32.
        together = 1 if job.checkpoint.family.has_state else recipe.traces.batch_size
        float32_bytes = 4 * count_active_weights(job.checkpoint)
        return pace.answers_s(prompts, length, together, read_bytes=float32_bytes)

    seconds = {}
    if not (traces or recipe.traces.server):
        seconds["trace"] = sampling_s(job.expect_trace_prompts(mean_length))
        own_texts = math.ceil(recipe.own_text_tokens / own_text.TOKENS)
        seconds["trace"] += sampling_s(own_texts, own_text.TOKENS)

    # Of all answers to a prompt at most two are learned, twice.
    answers = plan.recovery.shorten_answers_at_most if plan.recovery else 0
    learned = recipe.recover.tokens + 4 * answers / recipe.recover.samples * mean_length
    token_s = pace.token_s(mean_length)
    seconds["recover"] = token_s * _PASSES * learned + sampling_s(answers)

    tokens = 0.0
    if plan.pruning:
        expected_share = _EXPECTED_SHARE if plan.pruning.is_bound else 1
        tokens = expected_share * plan.pruning.prune_tokens
    # Artifacts of different codes are different models.
    models = {str(each.rounding_quants) for each in (job, *job.siblings)}
    passes = _BFLOAT16_PASSES if recipe.prune.compute == "bfloat16" else _PASSES
    seconds["prune"] = len(models) * pace.prune_s(tokens, mean_length, passes)

    if plan.artifact:
        answers_s = pace.answers_s(
            _expect_questions(job, plan) * recipe.verify.samples,
            min(mean_length, job.verification.max_new_tokens),
            job.verification.parallel,
            read_bytes=plan.artifact.artifact_bytes,
        )
        seconds["verify"] = plan.artifact.evaluation_models * answers_s

    return seconds


def _expect_questions(job: Job, plan: Plan) -> int:
    """Return how many questions equally good models are asked: fewer, if it is clear before."""
    early = plan.power.expected_prompts if plan.power else 0
    return early or len(job.problems("evaluation"))


def expect_answer_tokens(job: Job, traces: Sequence[Trace]) -> float:
    """Return the mean tokens of an answer; without traces, two thirds of the maximum."""
    lengths = [len(trace.completion_ids) for trace in traces]
    return fmean(lengths or [_EXPECTED_SHARE * job.trace_limit])


@dataclass(frozen=True)
class _Pace:
    """Pace of a model on this machine.

    Args:
        flops_per_s: products of numbers, that torch and llama.cpp reach.
        weights_s: of all active weights with one token.
        attention_s: of one token with each token before it.
    """

    shape: ModelShape
    flops_per_s: float
    weights_s: float
    attention_s: float

    @classmethod
    def measure(cls, checkpoint: Checkpoint, threads: int) -> _Pace:
        """Measure the machine; 0 ``threads`` are all cores."""
        cores = min(threads or available_cores(), available_cores())
        speed = _REACHED_SHARE * _measure_flops_per_s() * cores / available_cores()

        # Two products of a query with the half of the sequence that is before it.
        shape = checkpoint.shape
        heads = sum(compress(shape.widths["num_attention_heads"], shape.attends))
        return cls(
            shape,
            speed,
            weights_s=2 * count_active_weights(checkpoint) / speed,
            attention_s=2 * heads * shape.head_dim / speed,
        )

    def token_s(self, length: float) -> float:
        """Return the seconds of one token of a sequence."""
        return self.weights_s + self.attention_s * length

    def answers_s(self, prompts: int, length: float, together: int, *, read_bytes: float) -> float:
        """Return the seconds of answers; ``read_bytes``: of weights, in each step."""
        # A step is bound by arithmetic, or by reading all weights from memory once.
        step_s = max(together * self.token_s(length), read_bytes / _READ_BYTES_PER_S)
        steps = math.ceil(prompts / together) * length
        return steps * (step_s + _BLOCK_OVERHEAD_S * self.shape.block_count)

    def prune_s(self, tokens: float, length: float, passes: int) -> float:
        """Return the seconds of a pruning on tokens of sequences; it does not reach the head."""
        head_s = 2 * self.shape.vocab_size * self.shape.hidden_size / self.flops_per_s
        passes_s = (self.token_s(length) - head_s) * passes * tokens
        sweeps_s = (self.weights_s - head_s) * _SOLVE_SWEEPS * self.shape.hidden_size
        return passes_s + sweeps_s


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

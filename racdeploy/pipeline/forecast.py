"""How long a build will take: operations and bytes of each stage, over the speed of this machine.

For stages that the processor does; a GPU, or a server that answers, is as fast as it is. Counted
are the products of matrices, two operations a weight and token. What a stage reaches of the speed
of one large product was measured with ``python -m benchmarks.forecast``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.recover_stage import PROBED, list_phases
from racdeploy.prune.cost import Group, list_groups
from racdeploy.recipe import Pruning, Recovery
from racdeploy.storage.cores import multiplies_bfloat16
from racdeploy.storage.speed import Speed, has_gpu_driver
from racdeploy.tasks import Split
from racdeploy.traces.trace import Trace

_FLOAT32, _HALF = 4, 2
_CACHE_PASSES = 3  # of torch over keys and values at each token: copied to be grown, and read
_TRIANGLE = 1.12  # operations a pair of inputs and token; of the products only some are summed
_FACTORS = 4.0  # operations a cube of inputs: factor, inverse, and the inverse's factor
_WALKS = 3  # through a block: dense, sparse for the sums, and sparse again for the next block
_CODE_SWEEPS = 9  # over all columns, while codes are chosen
_LEARNING = 5  # passes forward: both models', one that is repeated, and two backward
_LOOKING = 1.25  # looks may take a quarter of the learning
_FASTER_IN_16_BITS = 3.0  # products of bfloat16, where the processor has them

# Of the speed of one large product.
_BY_TORCH = 0.5
_BY_SOLVING = 0.25
_BY_ENGINE = 0.5

# Seconds that one pass through a block takes beside its products.
_PASS_IN_TORCH_S = 2e-3
_PASS_IN_ENGINE_S = 0.2e-3


@dataclass(frozen=True)
class Work:
    """What a stage takes, as if every product went at the full speed of large ones."""

    flops: float = 0.0
    read_bytes: float = 0.0
    beside_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.read_bytes + other.read_bytes,
            self.beside_s + other.beside_s,
        )

    def __mul__(self, count: float) -> Work:
        return Work(self.flops * count, self.read_bytes * count, self.beside_s * count)

    def seconds(self, speed: Speed) -> float:
        """Return about how long it takes on a machine: the slower of its two bounds, and calls."""
        bound_s = max(self.flops / speed.flops_per_s, self.read_bytes / speed.bytes_per_s)
        return bound_s + self.beside_s


@dataclass(frozen=True)
class Asked:
    """Prompts of so many tokens, each answered by so many, some of them together.

    A batch goes on until the ``longest`` of its answers ends; 0 takes the usual one for it.
    """

    prompts: Sequence[int]
    tokens: float
    together: int
    longest: float = 0.0

    @property
    def steps(self) -> float:
        """Tokens that are decoded one after the other."""
        return math.ceil(len(self.prompts) / self.together) * (self.longest or self.tokens)


def foresee(job: Job, plan: Mapping[str, Any], traces: Sequence[Trace]) -> dict[str, Work]:
    """Return the work of each stage of a build, in order; none where a GPU may do it.

    Args:
        job: the build.
        plan: what is known of it: tokens to prune on, and to verify, where it is verified.
        traces: those that are there already; without any, every answer is at its longest.
    """
    if has_gpu_driver():
        return {}

    recipe, checkpoint = job.recipe, job.checkpoint
    lengths = [len(trace.completion_ids) for trace in traces] or [recipe.traces.max_new_tokens]
    usual = sum(lengths) / len(lengths)
    prompts = _prompt_tokens(job, "calibration")
    asked = Asked(prompts, usual, recipe.traces.batch, max(lengths))

    works = {}
    if not (traces or recipe.traces.server):
        works["traces"] = answer_in_torch(checkpoint, asked)

    tokens = plan.get("prune_tokens", plan.get("prune_tokens_at_most", 0))
    works["pruning"] = prune(checkpoint, recipe.prune, tokens)
    if steps := len(recipe.prune.schedule):  # the model answers after each
        works["pruning"] = (works["pruning"] + answer_in_torch(checkpoint, asked)) * steps

    if recipe.recover.tokens:
        phases = list_phases(recipe.recover, recipe.recover.ways or ("all",))
        probed = replace(asked, prompts=prompts[:PROBED])
        answers = answer_in_torch(checkpoint, probed) * (1 + len(phases))
        works["recovery"] = recover(checkpoint, recipe.recover) + answers

    if "evaluation_models" in plan:
        answers = verify(job, plan["artifact_bytes"], usual) * plan["evaluation_models"]
        compared = recipe.verify.logit_traces * (max(prompts) + usual)
        works["verification"] = answers + compare(checkpoint, compared)

    return works


def answer_in_torch(checkpoint: Checkpoint, asked: Asked) -> Work:
    """Return the work of answers in float32; a model with a state answers one by one."""
    together = 1 if checkpoint.has_state else asked.together
    asked = replace(asked, together=together)

    weights = _FLOAT32 * _active_weights(checkpoint)
    cache = _CACHE_PASSES * _FLOAT32 * _cached_values(checkpoint, asked)
    flops = _answer_flops(checkpoint, asked) / _BY_TORCH

    passes = (asked.steps + len(asked.prompts) / together) * checkpoint.block_count
    return Work(flops, weights * asked.steps + cache, passes * _PASS_IN_TORCH_S)


def answer_on_engine(checkpoint: Checkpoint, asked: Asked, artifact_bytes: int) -> Work:
    """Return the work of answers from an artifact, with keys and values in half precision."""
    cache = _HALF * _cached_values(checkpoint, asked)
    flops = _answer_flops(checkpoint, asked) / _BY_ENGINE

    passes = asked.steps * checkpoint.block_count
    return Work(flops, artifact_bytes * asked.steps + cache, passes * _PASS_IN_ENGINE_S)


def prune(checkpoint: Checkpoint, settings: Pruning, tokens: int) -> Work:
    """Return the work of one walk over all blocks with so many tokens."""
    walked = _WALKS * 2.0 * tokens * _active_weights(checkpoint, head=False)
    streams = 2 if settings.match_dense else 1
    summed = solved = refitted = 0.0
    sweeps = 1 + (_CODE_SWEEPS if settings.joint else 0)

    for group in itertools.chain.from_iterable(list_groups(checkpoint)):
        inputs, rows = group.shapes[0][1], sum(shape[0] for shape in group.shapes)
        summed += streams * _TRIANGLE * tokens * _met_by_token(checkpoint, group) * inputs**2
        solved += group.experts * (_FACTORS * inputs**3 + 2 * sweeps * rows * inputs**2)
        refitted += group.experts * 2 * settings.refit_steps * rows * inputs**2

    return Work((walked + summed + refitted) / _BY_TORCH + solved / _BY_SOLVING)


def recover(checkpoint: Checkpoint, settings: Recovery) -> Work:
    """Return the work of learning from so many tokens, with the looks at what was gained."""
    passed = 2.0 * settings.tokens * _active_weights(checkpoint)
    short = settings.compute != "float32" and multiplies_bfloat16()
    faster = _FASTER_IN_16_BITS if short else 1.0
    return Work(_LEARNING * _LOOKING * passed / _BY_TORCH / faster)


def verify(job: Job, artifact_bytes: int, usual: float) -> Work:
    """Return the work of one model's answers on the engine, of a usual length."""
    settings = job.recipe.verify
    tokens = min(usual, settings.max_new_tokens)
    prompts = _prompt_tokens(job, "evaluation") * settings.samples
    return answer_on_engine(
        job.checkpoint, Asked(prompts, tokens, settings.parallel), artifact_bytes
    )


def compare(checkpoint: Checkpoint, tokens: float) -> Work:
    """Return the work of logits of both checkpoints, in torch, over so many tokens."""
    return Work(2 * 2.0 * tokens * _active_weights(checkpoint) / _BY_TORCH)


def _prompt_tokens(job: Job, split: Split) -> list[int]:
    return [len(job.encoder.encode(problem.question)) for problem in job.problems(split)]


def _answer_flops(checkpoint: Checkpoint, asked: Asked) -> float:
    generated = len(asked.prompts) * asked.tokens
    products = 2.0 * (sum(asked.prompts) + generated) * _active_weights(checkpoint)

    # Each new token meets, in every block that attends, what came before it.
    heads = checkpoint.integer("num_attention_heads") * checkpoint.head_size
    before = sum(asked.prompts) / len(asked.prompts) + asked.tokens / 2
    return products + 4.0 * generated * before * heads * sum(checkpoint.attends)


def _cached_values(checkpoint: Checkpoint, asked: Asked) -> float:
    """Return how many numbers of the cache are passed over, at every token all before it."""
    a_token = 2 * checkpoint.key_value_heads * checkpoint.head_size * sum(checkpoint.attends)
    before = sum(asked.prompts) / len(asked.prompts) + asked.tokens / 2
    return len(asked.prompts) * asked.tokens * before * a_token


def _active_weights(checkpoint: Checkpoint, *, head: bool = True) -> float:
    """Return how many weights of linears one token meets; of experts, those it is sent to."""
    met = 0.0
    for group in itertools.chain.from_iterable(list_groups(checkpoint)):
        met += _met_by_token(checkpoint, group) * sum(map(math.prod, group.shapes))

    projection = checkpoint.integer("vocab_size") * checkpoint.integer("hidden_size")
    return met + (projection if head else 0)


def _met_by_token(checkpoint: Checkpoint, group: Group) -> int:
    """Return how many of the experts that have a group one token meets; 1 where all are alike."""
    return checkpoint.integer("num_experts_per_tok") if group.experts > 1 else 1

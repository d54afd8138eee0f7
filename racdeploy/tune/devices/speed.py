"""How fast a device decodes a model, and in how much memory, from its profile.

Time is a sum: each weight costs what its number format costs there, nearer to its price in the
cache the smaller the model is; attention costs by the positions kept; each block and each token
cost something besides. Memory is what ``racdeploy bench`` calls the peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from racdeploy.decoding.engine import BATCH_TOKENS
from racdeploy.errors import UsageError
from racdeploy.targets import Device, EngineCosts, FormatCost
from racdeploy.tune.devices.engines import LLAMACPP, TRAITS, Traits, file_bits
from racdeploy.tune.devices.kernels import find_cost, keep_known
from racdeploy.tune.devices.work import Block, Use, Work

_PICO, _MICRO = 1e12, 1e6
_FLOAT_BYTES = 4
STAYS = 0.25
"""Of the cache: a model up to this stays in it. Of one as large as the cache, nothing does."""


@dataclass(frozen=True)
class Prediction:
    """Of one model on one device: speed, memory, and the seconds that each part takes."""

    tokens_per_s: float
    memory_bytes: int
    seconds: Mapping[str, float]
    streamed: float  # share of the weights that comes from memory
    measured: bool  # whether the device was, or only estimated


def predict(device: Device, work: Work, use: Use) -> Prediction:
    """Return how fast a device decodes one sequence, and how much memory that takes.

    Raises:
        UsageError: the profile lacks the engine, or one of the model's number formats.
    """
    costs = device.costs(work.engine)
    work = keep_known(costs, work)
    streamed = share_streamed(work.read_bytes, device.cache_bytes)

    weights_ps = 0.0
    for name, count in work.weights.items():
        weights_ps += count * _find_cost(device, costs, name).at(streamed)

    for (name, zeros), count in work.sparse.items():
        cost = find_cost(costs, name, zeros)
        assert cost, "which was looked for"
        weights_ps -= count * (costs.formats[name].at(streamed) - cost.at(streamed))

    attention_ps = costs.attention_ps * attend(work.blocks, use, work.engine)
    vocabulary_ps = costs.vocabulary_ps * work.vocabulary

    seconds = {
        "weights": weights_ps / _PICO,
        "attention": attention_ps / _PICO,
        "blocks": costs.block_us * len(work.blocks) / _MICRO,
        "token": costs.token_us / _MICRO + vocabulary_ps / _PICO,
    }

    memory_bytes = predict_memory(device, work, use)
    total = sum(seconds.values())
    return Prediction(1 / total, memory_bytes, seconds, streamed, device.measured)


def predict_memory(device: Device, work: Work, use: Use) -> int:
    """Return the bytes at the peak of the process that decodes."""
    costs = device.costs(work.engine)
    known = keep_known(costs, work)
    return costs.base_bytes + round(sum_memory(costs, known, use))


def _find_cost(device: Device, costs: EngineCosts, quant: str) -> FormatCost:
    if quant not in costs.formats:
        raise UsageError(
            f"the profile of {device.name} does not say what {quant} costs",
            remedy=f"it knows {', '.join(costs.formats)}; measure it: racdeploy bench --profile",
        )
    return costs.formats[quant]


def share_streamed(read_bytes: float, cache_bytes: int) -> float:
    """Return the share of the weights that no longer is in the cache when its turn comes again."""
    stays = STAYS * cache_bytes
    return min(1.0, max(0.0, (read_bytes - stays) / (cache_bytes - stays)))


def attend(blocks: Sequence[Block], use: Use, engine: str = LLAMACPP) -> float:
    """Return positions times the width of the queries, of all blocks, on average over an answer."""
    traits = TRAITS[engine]
    positions = range(use.prompt_tokens, use.prompt_tokens + use.new_tokens)
    total = 0.0

    for window in {block.window for block in blocks}:
        counts = [_count_cells(traits, position + 1, window) for position in positions]
        width = sum(block.query_width for block in blocks if block.window == window)
        total += sum(counts) / len(counts) * width

    return total


def _count_cells(traits: Traits, used: int, window: int = 0) -> int:
    """Return how many positions are computed with where so many are used."""
    kept = min(used, window + BATCH_TOKENS) if window else used
    return -(-kept // traits.cells) * traits.cells


def sum_memory(costs: EngineCosts, work: Work, use: Use) -> float:
    """Return the bytes at the peak beyond those of a process with no model."""
    taken = float(work.file_bytes) + work.kept_bytes
    repacked = dict(work.repacked_bytes)
    passing = work.passing_bytes

    for (name, zeros), count in work.sparse.items():
        own_bytes = count * file_bits(work.engine, name) / 8
        repacked[name] = max(0, repacked.get(name, 0) - round(own_bytes))

        if cost := find_cost(costs, name, zeros):
            freed_bytes = (1 - cost.resident) * own_bytes
            taken -= freed_bytes
            passing += freed_bytes  # the whole file is mapped while it is loaded

    for name, size_bytes in repacked.items():
        copies = costs.formats[name].resident - 1
        taken += copies * size_bytes

    taken += costs.vocabulary_bytes * work.vocabulary
    taken += costs.block_bytes * len(work.blocks)
    return taken + max(passing, _count_running_bytes(work, use))


def _count_running_bytes(work: Work, use: Use) -> float:
    """Return the bytes of the key-value cache, and of what a batch of the prompt needs besides."""
    traits = TRAITS[work.engine]
    positions = use.prompt_tokens + use.new_tokens
    if traits.takes_context:
        positions = use.context_tokens

    cache = 0
    for block in work.blocks:
        cache += _count_cells(traits, positions, block.window) * block.key_value_width

    batch = min(use.prompt_tokens, BATCH_TOKENS)
    heads = max((block.heads for block in work.blocks), default=0)
    numbers = traits.scores * heads * _count_cells(traits, use.prompt_tokens)
    numbers += traits.activations * work.channels

    if traits.logits_bytes:
        fitting = traits.logits_bytes // (_FLOAT_BYTES * work.vocabulary)
        batch = min(batch, max(1, fitting))
        numbers += work.vocabulary

    return traits.cache_bytes * cache + _FLOAT_BYTES * batch * numbers

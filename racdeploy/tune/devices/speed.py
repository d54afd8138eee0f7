"""How fast a device decodes a model, and in how much memory, from its profile.

Time is a sum: each weight costs what its number format costs there, nearer to its price in the
cache the smaller the model is; attention costs by the positions kept; each block and each token
cost something besides. Memory is what ``racdeploy bench`` calls the peak.
Source: llama.cpp 0.3.36 in python, whose cache grows by 256 positions and whose batches have 512.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from racdeploy import quant as quants
from racdeploy.errors import UsageError
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expert_of
from racdeploy.targets import Device, EngineCosts, FormatCost

_PICO, _MICRO = 1e12, 1e6
_CELLS = 256  # positions by which the part of the cache that is computed with grows
_BATCH_TOKENS = 512
_CACHE_BYTES = 2  # of a number in the key-value cache
_FLOAT_BYTES = 4
STAYS = 0.25
"""Of the cache: a model up to this stays in it. Of one as large as the cache, nothing does."""
_REPACKED_ROWS = 8  # a matrix with other numbers of rows is not repacked
_ACTIVATIONS = 3  # as wide as the feed-forward part, alive at once
_SCORES = 2  # of a head and position, alive at once


@dataclass(frozen=True)
class Use:
    """How a model is run: one sequence, as ``racdeploy bench`` does it."""

    context_tokens: int = 4096  # that the engine makes room for
    prompt_tokens: int = 256
    new_tokens: int = 128


@dataclass(frozen=True)
class Block:
    """What attention of one block needs: widths, and how far back it looks; 0 is all."""

    heads: int
    query_width: int
    key_value_width: int  # keys and values together; 0 where it has none of its own
    window: int = 0


@dataclass(frozen=True)
class Work:
    """What decoding one token takes, and what stays in memory.

    Args:
        weights: by number format, how many are read for one token.
        repacked_bytes: by number format, bytes of matrices that an engine may repack.
        file_bytes: of all files that the engine opens.
        channels: of the widest feed-forward part.
    """

    weights: Mapping[str, float]
    repacked_bytes: Mapping[str, int]
    file_bytes: int
    blocks: tuple[Block, ...]
    channels: int
    vocabulary: int

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that are read for one token."""
        return sum(count * quants.load(name).BITS / 8 for name, count in self.weights.items())


@dataclass(frozen=True)
class Prediction:
    """Of one model on one device: speed, memory, and the seconds that each part takes."""

    tokens_per_s: float
    memory_bytes: int
    seconds: Mapping[str, float]
    streamed: float  # share of the weights that comes from memory
    measured: bool  # whether the device was, or only estimated


def predict(device: Device, work: Work, use: Use, engine: str = "llamacpp") -> Prediction:
    """Return how fast a device decodes one sequence, and how much memory that takes.

    Raises:
        UsageError: the profile lacks the engine, or one of the model's number formats.
    """
    costs = device.costs(engine)
    streamed = share_streamed(work.read_bytes, device.cache_bytes)

    weights_ps = 0.0
    for name, count in work.weights.items():
        weights_ps += count * _find_cost(device, costs, name).at(streamed)

    attention_ps = costs.attention_ps * attend(work.blocks, use)
    vocabulary_ps = costs.vocabulary_ps * work.vocabulary

    seconds = {
        "weights": weights_ps / _PICO,
        "attention": attention_ps / _PICO,
        "blocks": costs.block_us * len(work.blocks) / _MICRO,
        "token": costs.token_us / _MICRO + vocabulary_ps / _PICO,
    }

    memory_bytes = costs.base_bytes + round(sum_memory(costs, work, use))
    total = sum(seconds.values())
    return Prediction(1 / total, memory_bytes, seconds, streamed, device.measured)


def measure_work(checkpoint: Checkpoint, tensors: Sequence[PlannedTensor], file_bytes: int) -> Work:
    """Return what a GGUF file takes to decode with, from the plan of its tensors.

    Args:
        checkpoint: what the plan is of, or its skeleton.
        file_bytes: of the plain file or files.
    """
    weights: dict[str, float] = defaultdict(float)
    repacked: dict[str, int] = defaultdict(int)
    names = {tensor.name for tensor in tensors}

    for tensor in tensors:
        if len(tensor.shape) < 2 or not _is_multiplied(tensor.name, names):
            continue

        share = _share_of_experts(checkpoint, tensor)
        weights[tensor.quant_real] += share * math.prod(tensor.shape)

        if tensor.shape[-2] % _REPACKED_ROWS == 0:
            repacked[tensor.quant_real] += tensor.size_bytes

    blocks = range(checkpoint.block_count)
    return Work(
        weights=dict(weights),
        repacked_bytes=dict(repacked),
        file_bytes=file_bytes,
        blocks=tuple(_describe(checkpoint, block) for block in blocks),
        channels=max(checkpoint.sizes(block)["F"] for block in blocks),
        vocabulary=checkpoint.integer("vocab_size"),
    )


def _is_multiplied(name: str, names: set[str]) -> bool:
    """Return whether every token is multiplied with a matrix; an embedding gives one row."""
    if name.startswith(("token_embd", "per_layer_token_embd")):
        return name == "token_embd.weight" and "output.weight" not in names
    return True


def _share_of_experts(checkpoint: Checkpoint, tensor: PlannedTensor) -> float:
    """Return which share of a tensor's experts a token goes through; 1 where it has none."""
    is_routed = any(expert_of(part) is not None for part in tensor.parts)
    used = checkpoint.config.get("num_experts_per_tok")
    if not is_routed or not checkpoint.experts or not isinstance(used, int):
        return 1.0
    return min(1.0, used / checkpoint.experts)


def _describe(checkpoint: Checkpoint, block: int) -> Block:
    sizes = checkpoint.sizes(block)
    if not checkpoint.attends[block]:
        return Block(0, 0, 0)

    window = 0
    if checkpoint.layer_types[block] == "sliding_attention":
        window = checkpoint.config.get("sliding_window") or 0

    has_keys = checkpoint.key_sources[block] == block
    keys = 2 * sizes["KV"] if has_keys else 0

    return Block(sizes["H"], sizes["Q"], keys, window)


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


def attend(blocks: Sequence[Block], use: Use) -> float:
    """Return positions times the width of the queries, of all blocks, on average over an answer."""
    positions = range(use.prompt_tokens, use.prompt_tokens + use.new_tokens)
    total = 0.0
    for window in {block.window for block in blocks}:
        cells = sum(_count_cells(position + 1, window) for position in positions) / len(positions)
        total += cells * sum(block.query_width for block in blocks if block.window == window)
    return total


def _count_cells(used: int, window: int = 0) -> int:
    """Return how many positions are computed with where so many are used."""
    kept = min(used, window + _BATCH_TOKENS) if window else used
    return -(-kept // _CELLS) * _CELLS


def sum_memory(costs: EngineCosts, work: Work, use: Use) -> float:
    """Return the bytes that an engine takes beyond those of a process with no model."""
    taken = float(work.file_bytes)

    for name, size_bytes in work.repacked_bytes.items():
        copies = costs.formats[name].resident - 1
        taken += copies * size_bytes

    # The key-value cache.
    for block in work.blocks:
        kept = _count_cells(use.context_tokens, block.window)
        taken += _CACHE_BYTES * kept * block.key_value_width

    # Scores and activations of a batch of the prompt.
    heads = max((block.heads for block in work.blocks), default=0)
    scores = _SCORES * heads * _count_cells(use.prompt_tokens)
    activations = _ACTIVATIONS * work.channels
    batch = min(use.prompt_tokens, _BATCH_TOKENS)
    taken += _FLOAT_BYTES * batch * (scores + activations)

    taken += costs.vocabulary_bytes * work.vocabulary
    taken += costs.block_bytes * len(work.blocks)
    return taken

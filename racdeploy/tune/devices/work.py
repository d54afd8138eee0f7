"""What a model is to an engine that decodes with it: weights of each number format, and blocks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expert_of
from racdeploy.recipe import Zeros, count_zeros
from racdeploy.storage.ggml_types import GGML_TYPES
from racdeploy.tune.devices.engines import LLAMACPP, read_bits

_REPACKED_ROWS = 8  # a matrix with other numbers of rows is not repacked
_SPARSE_COLUMNS = 32  # sparse kernels take multiples of this
_MASK_BITS = 1  # of a weight: whether it is kept
_PADDING_BITS = 0.5  # of a weight: the codes of each group of 128 fill up whole words

Sparse = Mapping[tuple[str, Zeros], float]
"""Numbers of weights that sparse kernels multiply, by number format and zeros."""


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
        sparse: those among them that sparse kernels may take, where the device has some.
        repacked_bytes: by number format, bytes of matrices that an engine may repack.
        file_bytes: of all files that the engine opens.
        channels: of the widest feed-forward part.
        kept_bytes, passing_bytes: of copies that lie beside the weights, and while it loads.
    """

    weights: Mapping[str, float]
    repacked_bytes: Mapping[str, int]
    file_bytes: int
    blocks: tuple[Block, ...]
    channels: int
    vocabulary: int
    engine: str = LLAMACPP
    kept_bytes: float = 0.0
    passing_bytes: float = 0.0
    sparse: Sparse = field(default_factory=dict)

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that are read for one token."""
        bits = sum(count * read_bits(self.engine, name) for name, count in self.weights.items())

        for (name, zeros), count in self.sparse.items():
            bits -= count * (read_bits(self.engine, name) - packed_bits(name, zeros))

        return bits / 8


def packed_bits(quant: str, zeros: Zeros) -> float:
    """Return the bits of a weight that sparse kernels hold, and read for a token."""
    stored_bits = GGML_TYPES[quant].bits
    code_bits = int(stored_bits)  # the rest is its share of a scale
    kept_bits = (1 - count_zeros(zeros)) * code_bits
    return stored_bits - code_bits + _MASK_BITS + kept_bits + _PADDING_BITS


def measure_work(
    checkpoint: Checkpoint,
    tensors: Sequence[PlannedTensor],
    file_bytes: int,
    zeros: Mapping[str, Zeros] | None = None,
) -> Work:
    """Return what a GGUF file takes to decode with, from the plan of its tensors.

    Args:
        checkpoint: what the plan is of, or its skeleton.
        file_bytes: of the plain file or files.
        zeros: of the tensors that have some, by name.
    """
    weights: dict[str, float] = defaultdict(float)
    repacked: dict[str, int] = defaultdict(int)
    sparse: dict[tuple[str, Zeros], float] = defaultdict(float)
    zeros = zeros or {}
    names = {tensor.name for tensor in tensors}

    for tensor in tensors:
        if len(tensor.shape) < 2 or not _is_multiplied(tensor.name, names):
            continue

        share = share_of_experts(checkpoint, tensor.parts)
        weights[tensor.quant_real] += share * math.prod(tensor.shape)

        if tensor.shape[-2] % _REPACKED_ROWS == 0:
            repacked[tensor.quant_real] += tensor.size_bytes
        if tensor.name in zeros and _suits_kernels(tensor):
            sparse[tensor.quant_real, zeros[tensor.name]] += math.prod(tensor.shape)

    work = sum_up(checkpoint, weights, repacked, file_bytes)
    return replace(work, sparse=dict(sparse))


def sum_up(
    checkpoint: Checkpoint,
    weights: Mapping[str, float],
    repacked_bytes: Mapping[str, int],
    file_bytes: int,
    engine: str = LLAMACPP,
) -> Work:
    """Return the work of a file whose weights were counted; its blocks are the checkpoint's."""
    blocks = range(checkpoint.block_count)
    return Work(
        weights=dict(weights),
        repacked_bytes=dict(repacked_bytes),
        file_bytes=file_bytes,
        blocks=tuple(_describe(checkpoint, block) for block in blocks),
        channels=max(checkpoint.sizes(block)["F"] for block in blocks),
        vocabulary=checkpoint.integer("vocab_size"),
        engine=engine,
    )


def _is_multiplied(name: str, names: set[str]) -> bool:
    """Return whether every token is multiplied with a matrix; an embedding gives one row."""
    if name.startswith(("token_embd", "per_layer_token_embd")):
        return name == "token_embd.weight" and "output.weight" not in names
    return True


def _suits_kernels(tensor: PlannedTensor) -> bool:
    """Return whether sparse kernels multiply matrices of such a shape; experts are left alone."""
    block = GGML_TYPES[tensor.quant_real].block_weights
    return len(tensor.shape) == 2 and tensor.shape[-1] % max(block, _SPARSE_COLUMNS) == 0


def share_of_experts(checkpoint: Checkpoint, names: Sequence[str]) -> float:
    """Return which share of the experts of a tensor a token goes through; 1 where it has none."""
    is_routed = any(expert_of(name) is not None for name in names)
    used = checkpoint.config.get("num_experts_per_tok")
    if not is_routed or not checkpoint.experts or not isinstance(used, int):
        return 1.0
    return min(1.0, used / checkpoint.experts)


def _describe(checkpoint: Checkpoint, block: int) -> Block:
    """Return what attention of a block needs."""
    sizes = checkpoint.sizes(block)
    if not checkpoint.attends[block]:
        return Block(0, 0, 0)

    window = 0
    if checkpoint.layer_types[block] == "sliding_attention":
        window = checkpoint.config.get("sliding_window") or 0

    has_keys = checkpoint.key_sources[block] == block
    keys = 2 * sizes["KV"] if has_keys else 0

    return Block(sizes["H"], sizes["Q"], keys, window)

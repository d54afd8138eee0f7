"""Write llama-shaped GGUF files of random weights, of any size and number format, in a moment.

Of each matrix a few rows are quantized and repeated: what a weight holds decides no engine's time,
but for zeros, of which sparse kernels want to see enough.
Source: ``llama_model_llama`` in llama.cpp, its tensors and keys. Tokens are words without meaning,
since an engine's memory grows with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.recipe import Zeros, count_zeros, read_kept_of

_ROWS = 32  # quantized of a matrix
_POSITIONS = 32_768
_SCALE = 0.02  # of the weights, as initializers have it


@dataclass(frozen=True)
class Dimensions:
    """How large a synthetic model is; its embedding is tied, and of the same number format."""

    blocks: int
    hidden: int
    channels: int
    heads: int
    key_value_heads: int
    head_size: int = 64
    vocabulary: int = 256

    @property
    def query_width(self) -> int:
        """Outputs of the queries' matrix."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Outputs of the keys' matrix, and of the values'."""
        return self.key_value_heads * self.head_size

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shape, outputs first, of each matrix of a block by its name in the file."""
        queries, keys = self.query_width, self.key_width
        return {
            "attn_q": (queries, self.hidden),
            "attn_k": (keys, self.hidden),
            "attn_v": (keys, self.hidden),
            "attn_output": (self.hidden, queries),
            "ffn_gate": (self.channels, self.hidden),
            "ffn_up": (self.channels, self.hidden),
            "ffn_down": (self.hidden, self.channels),
        }

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of one block."""
        return sum(rows * columns for rows, columns in self.matrices.values())

    @property
    def head_weights(self) -> int:
        """Weights of the output projection."""
        return self.vocabulary * self.hidden


def write_model(
    file: Path, quant: str, size: Dimensions, head_quant: str, zeros: Zeros = 0.0
) -> Path:
    """Write a model whose matrices have a number format, and its output projection another.

    Args:
        zeros: of the matrices of the blocks, at the least.
    """
    shapes = _list_tensors(quant, size, head_quant)

    writer = gguf.GGUFWriter(file, "llama")
    try:
        _write_keys(writer, size)
        for name, shape, own in shapes:
            form = quants.load_ggml(own)
            kind = gguf.GGMLQuantizationType(form.GGML_TYPE)
            size_bytes = round(math.prod(shape) * form.BITS / 8)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size_bytes, kind)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()

    with file.open("ab") as stream:
        _pad(stream)
        for name, shape, own in shapes:
            rows = shape[0] if len(shape) > 1 else 1
            own_zeros = zeros if name.startswith("blk.") and rows > 1 else 0.0
            # In one piece, as an exporter writes it: smaller ones lie in smaller pages of the
            # system's cache, from which a mapped file is read more slowly.
            slab = random_rows(own, shape[-1], own_zeros)
            turns = -(-rows // len(slab))
            stream.write(np.tile(slab, (turns, 1))[:rows].data)
            _pad(stream)

    return file


def _list_tensors(
    quant: str, size: Dimensions, head_quant: str
) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and number format of each tensor, in file order."""
    tensors: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (size.vocabulary, size.hidden), head_quant),
        ("output_norm.weight", (size.hidden,), "f32"),
    ]

    norms = dict.fromkeys(("attn_norm", "ffn_norm"), (size.hidden,))
    for block in range(size.blocks):
        for name, vector in norms.items():
            tensors.append((f"blk.{block}.{name}.weight", vector, "f32"))
        for name, matrix in size.matrices.items():
            tensors.append((f"blk.{block}.{name}.weight", matrix, quant))

    return tensors


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _write_keys(writer: gguf.GGUFWriter, size: Dimensions) -> None:
    writer.add_block_count(size.blocks)
    writer.add_context_length(_POSITIONS)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.channels)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.key_value_heads)
    writer.add_key_length(size.head_size)
    writer.add_value_length(size.head_size)
    writer.add_rope_dimension_count(size.head_size)
    writer.add_layer_norm_rms_eps(1e-5)

    words = [f"w{number:06d}" for number in range(size.vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([f"{word} {word}" for word in words])


@cache
def random_rows(quant: str, columns: int, zeros: Zeros = 0.0) -> NDArray[np.uint8]:
    """Return a few packed rows of random weights, of which so many are zeros at the least."""
    generator = np.random.default_rng(0)
    weight_OI = generator.normal(0.0, _SCALE, (_ROWS, columns)).astype(np.float32)
    if zeros:
        inputs_OI = np.exp(generator.standard_normal(weight_OI.shape))
        weight_OI[find_least(np.abs(weight_OI) * inputs_OI, zeros)] = 0

    return np.ascontiguousarray(quants.load(quant).quantize(weight_OI))


def find_least(score_OI: NDArray[Any], zeros: Zeros) -> NDArray[np.bool_]:
    """Return True where a weight becomes zero: of all, or of each M, those with the least score."""
    kept_of = read_kept_of(zeros)
    # A group that does not fit is as good as any zeros.
    if kept_of is None or score_OI.shape[1] % kept_of[1]:
        bound = np.quantile(score_OI, count_zeros(zeros), method="higher")
        return np.asarray(score_OI <= bound)

    kept, of = kept_of
    rank_OGS = score_OI.reshape(len(score_OI), -1, of).argsort(axis=2).argsort(axis=2)
    return np.asarray(rank_OGS.reshape(score_OI.shape) < of - kept)

"""Write Llama models of random weights as GGUF, of any size and number format, quickly.

A few rows of each matrix are quantized and repeated: engines take the same time for any values.
Source: ``llama_model_llama`` in llama.cpp, its tensors and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants

_HEAD_SIZE, _VOCABULARY, _POSITIONS = 64, 256, 32_768
_HEAD_QUANT = "q8_0"
_ROWS = 32  # quantized, then repeated


@dataclass(frozen=True)
class Dimensions:
    """Size of a synthetic model; ``hidden`` is a multiple of 64, of 256 for K-quants."""

    blocks: int
    hidden: int = 512

    @property
    def channels(self) -> int:
        """Width of the feed-forward network."""
        return 3 * self.hidden

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shape (outputs, inputs) of each matrix of a block, by its name in the file."""
        attention = ("attn_q", "attn_k", "attn_v", "attn_output")
        shapes = dict.fromkeys(attention, (self.hidden, self.hidden))
        shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (self.channels, self.hidden))
        return shapes | {"ffn_down": (self.hidden, self.channels)}

    @property
    def block_weights(self) -> int:
        """Number of weights of a block's matrices."""
        return sum(rows * columns for rows, columns in self.matrices.values())


def write_model(file: Path, quant: str, size: Dimensions) -> Path:
    """Write a model whose blocks are in a number format; return its file."""
    writer = gguf.GGUFWriter(file, "llama")
    try:
        _write_keys(writer, size)
        _add(writer, "token_embd.weight", (_VOCABULARY, size.hidden), _HEAD_QUANT)
        _add(writer, "output_norm.weight", (1, size.hidden), "f32")
        for block in range(size.blocks):
            for name in ("attn_norm", "ffn_norm"):
                _add(writer, f"blk.{block}.{name}.weight", (1, size.hidden), "f32")
            for name, shape in size.matrices.items():
                _add(writer, f"blk.{block}.{name}.weight", shape, quant)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, shape: tuple[int, int], quant: str) -> None:
    rows, columns = shape
    if rows == 1:
        writer.add_tensor(name, np.ones(columns, np.float32))
        return
    slab_OP = _random_rows(quant, columns)
    packed_OP = np.tile(slab_OP, (-(-rows // _ROWS), 1))[:rows]
    kind = gguf.GGMLQuantizationType(quants.load_ggml(quant).type_id)
    writer.add_tensor(name, packed_OP, raw_dtype=kind)


def _write_keys(writer: gguf.GGUFWriter, size: Dimensions) -> None:
    heads = size.hidden // _HEAD_SIZE
    writer.add_block_count(size.blocks)
    writer.add_context_length(_POSITIONS)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.channels)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(_HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)

    words = [f"w{number:06d}" for number in range(_VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([f"{word} {word}" for word in words])


@cache
def _random_rows(quant: str, columns: int) -> NDArray[np.uint8]:
    """Return ``_ROWS`` packed rows of random weights."""
    generator = np.random.default_rng(0)
    weight_OI = generator.normal(0.0, 0.02, (_ROWS, columns)).astype(np.float32)
    return np.ascontiguousarray(quants.load(quant).quantize(weight_OI))

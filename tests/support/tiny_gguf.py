"""Small GGUF files of chosen bytes, written by gguf-py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from racdeploy.tensors.ggml_types import TYPES_BY_ID

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8, "q6_k": 14, "bf16": 30, "mxfp4": 39}


def random_rows(kind: str, rows: int, row_length: int, zeros: float, seed: int = 0) -> np.ndarray:
    """Return the bytes of random weights, a row of bytes for each row.

    Whole blocks are zero in places.
    """
    generator = np.random.default_rng(seed)
    _, _, block_weights, block_bytes = TYPES_BY_ID[TYPES[kind]]
    plain = generator.integers(
        0, 256, (rows, row_length // block_weights, block_bytes), dtype=np.uint8
    )
    drop = generator.random((rows, row_length)) < zeros
    match kind:
        case "q8_0":
            plain[:, :, 2:][drop.reshape(rows, -1, 32)] = 0
        case "q4_0" | "q5_0" | "mxfp4":
            low, high = (
                part.reshape(rows, -1, 16)
                for part in np.split(drop.reshape(rows, -1, 32), 2, axis=2)
            )
            nibbles = plain[:, :, -16:]
            zero = 8 if kind == "q4_0" else 0
            nibbles[low] = nibbles[low] & 0xF0 | zero
            nibbles[high] = nibbles[high] & 0x0F | zero << 4
            if kind == "q5_0":
                plain[:, :, 2:6] |= np.packbits(
                    drop.reshape(rows, -1, 32), axis=2, bitorder="little"
                )
        case "f32" | "f16" | "bf16":
            plain.reshape(rows, row_length, block_bytes)[drop] = 0
    return plain.reshape(rows, -1)


def write_gguf(
    file: Path, tensors: Mapping[str, tuple[str, np.ndarray]], alignment: int = 32
) -> Path:
    """Write tensors, given by number format and rows of bytes, with a few keys of every kind."""
    writer = gguf.GGUFWriter(file, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "tiny ☃")
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ünï"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name, (kind, plain_OP) in tensors.items():
        writer.add_tensor(name, plain_OP, raw_dtype=gguf.GGMLQuantizationType(TYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file

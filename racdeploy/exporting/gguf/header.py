"""Write the header of a GGUF file: metadata, hyperparameters, tokens, and infos of the tensors.

Source: ggml/docs/gguf.md, "General metadata", and the naming convention there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from racdeploy import __version__
from racdeploy.exporting.gguf import splits
from racdeploy.exporting.gguf.parameters import write_parameters
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.exporting.gguf.vocabulary import Vocabulary
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.models.model_card import read_languages
from racdeploy.quant import presets

_OWN_KEYS = ("architecture", "alignment", "file_type", "quantization_version")
RESERVED_KEYS = tuple(f"general.{key}" for key in _OWN_KEYS)
"""Metadata keys that describe the file itself; callers cannot set them."""


@contextmanager
def open_header(file: Path, arch: str) -> Iterator[gguf.GGUFWriter]:
    """Yield a writer for the keys of a GGUF file, and write them at the end."""
    with closing(gguf.GGUFWriter(file, arch)) as writer:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def make_general_metadata(
    checkpoint: Checkpoint, mix: presets.QuantRules, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the general metadata in file order; ``metadata`` overrides the checkpoint's."""
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": checkpoint.folder.resolve().name,
        "general.quantized_by": f"racdeploy {__version__}",
    }

    if checkpoint.license:
        values["general.license"] = checkpoint.license

    if languages := read_languages(checkpoint.folder):
        values["general.languages"] = languages

    values["general.tags"] = ["text-generation", "racdeploy"]
    if metadata.get("racdeploy.sparsity"):
        values["general.tags"].append("sparse")

    values |= metadata
    values["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    values["general.file_type"] = _find_file_type(mix)
    return values


def write_header(
    checkpoint: Checkpoint,
    family: Family,
    file: Path,
    tensors: Sequence[GgufTensorPlan],
    *,
    vocabulary: Vocabulary | None,
    general: Mapping[str, Any],
    split: tuple[int, int, int],
) -> None:
    """Write the header of a GGUF file.

    Args:
        family: with the architecture of the file.
        vocabulary: None for the files of a split model other than the first, as ``general`` is {}.
        split: number of the file, of files, and of the tensors in all of them.
    """
    with open_header(file, family.gguf_arch) as writer:
        for key, value in general.items():
            _add_value(writer, key, value)
        if vocabulary:
            write_parameters(writer, checkpoint.shape, family, checkpoint.mtp_blocks)
            vocabulary.write(writer, checkpoint.tokenizer.chat_template)

        number, files, all_tensors = split
        if files > 1:
            writer.add_uint16(splits.NUMBER_KEY, number)
            writer.add_uint16(splits.COUNT_KEY, files)
            writer.add_int32(splits.TENSORS_KEY, all_tensors)

        for tensor in tensors:
            kind = gguf.GGMLQuantizationType(tensor.ggml_type)
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                tensor_dtype=np.dtype(np.float32),  # gguf-py requires one and writes ``kind``
                tensor_nbytes=tensor.size_bytes,
                raw_dtype=kind,
            )


def _add_value(
    writer: gguf.GGUFWriter, key: str, value: str | int | float | bool | list[str]
) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if 0 <= value < 2**32:
            writer.add_uint32(key, value)
        case int():
            writer.add_int64(key, value)
        case float():
            writer.add_float64(key, value)
        case str():  # add_string drops empty strings
            writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
        case list():
            writer.add_array(key, value)


def _find_file_type(mix: presets.QuantRules) -> int:
    """Return llama.cpp's ``general.file_type``: the type of most tensors."""
    known = gguf.LlamaFileType.__members__
    for upper in (mix.name.upper(), mix.quant.upper()):
        for name in (f"ALL_{upper}", f"MOSTLY_{upper}", f"MOSTLY_{upper}_S"):
            if name in known:
                return int(known[name])
    return int(gguf.LlamaFileType.GUESSED)

"""The ``general.*`` keys of a GGUF file: what it is, of which model, in which number format.

They decide nothing in llama.cpp; the Hub, LM Studio and people read them.
Source: ggml/docs/gguf.md, "General metadata", and the naming convention there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter, LlamaFileType

from racdeploy import __version__
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.model_card import read_languages
from racdeploy.quant import presets

FILE_KEYS = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
)
"""Keys that say how the file is to be read, and are nobody's to choose."""


def list_general_values(
    checkpoint: Checkpoint, mix: presets.Mix, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keys in file order; the caller's own win over what the checkpoint says."""
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
    values["general.quantization_version"] = GGML_QUANT_VERSION
    values["general.file_type"] = _find_file_type(mix)
    return values


def add_value(writer: GGUFWriter, key: str, value: str | int | float | bool | list[str]) -> None:
    """Add a key with the type that fits its value."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if 0 <= value < 2**32:
            writer.add_uint32(key, value)
        case int():
            writer.add_int64(key, value)
        case float():
            writer.add_float64(key, value)
        case str():  # add_string drops empty ones
            writer.add_key_value(key, value, GGUFValueType.STRING)
        case list():
            writer.add_array(key, value)


def _find_file_type(mix: presets.Mix) -> int:
    """Return llama.cpp's number for a file that is mostly of one type; it decides nothing."""
    for upper in (mix.name.upper(), mix.quant.upper()):
        for name in (f"ALL_{upper}", f"MOSTLY_{upper}", f"MOSTLY_{upper}_S"):
            if name in LlamaFileType.__members__:
                return int(LlamaFileType[name])
    return int(LlamaFileType.GUESSED)

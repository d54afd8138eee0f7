"""GGUF, llama.cpp's file format, written from safetensors with numpy; or a packed container of it.

Source: GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from racdeploy import packing as packings
from racdeploy.errors import UsageError
from racdeploy.exporting import MeasuredTensor
from racdeploy.exporting.gguf.architecture import unsupported_reason as unsupported_reason
from racdeploy.exporting.gguf.measurement import measure as measure
from racdeploy.exporting.gguf.programs import companions as companions
from racdeploy.exporting.gguf.programs import usage as usage
from racdeploy.exporting.gguf.tokenizer import (
    write_approximate_tokenizer as write_approximate_tokenizer,
)
from racdeploy.exporting.gguf.writer import export as export
from racdeploy.files.reading import Json
from racdeploy.files.writing import refuse_overwrite
from racdeploy.models.families import Family
from racdeploy.packing import racgguf
from racdeploy.recipe import Export

BACKEND = "llamacpp"
REQUIRED_PACKAGES = {"llama_cpp": "llamacpp"}
HUB_LIBRARY = "gguf"
COMMON_QUANTS = ("q8_0", "q4_k_m")
COMPARES_F32 = False
OPTIONS = ("accept_token_differences", "importance", "pre_tokenizer", "split_bytes", "tensors")
TOKENIZER_PREFIX = "tokenizer.ggml."
WEIGHT_SUFFIXES = ()


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the file's path, at the top of a bundle; ``name`` already has the quant."""
    return PurePosixPath(f"{name}{packings.load_gguf(packing).SUFFIX}")


def list_linears(
    family: Family, metadata: Json, tensors: Iterable[MeasuredTensor]
) -> frozenset[str]:
    """Return the names of the tensors that are prunable linears."""
    # The file may be of the family's architecture with widths per block, which names them its way.
    forms = [family]
    if family.per_block_arch:
        forms.append(family.with_per_block_arch())

    endings: set[str] = set()
    for form in forms:
        for linear in family.linears:
            endings.update(form.list_gguf_names(f"{linear}.weight"))

    # The blocks of a multi-token-prediction head come last. They have the same names, and all
    # their weights.
    architecture = metadata["general.architecture"]
    mtp_blocks = metadata.get(f"{architecture}.nextn_predict_layers", 0)
    blocks = metadata[f"{architecture}.block_count"] - mtp_blocks

    linears = []
    for tensor in tensors:
        block, _, ending = tensor.name.removeprefix("blk.").partition(".")
        if ending in endings and int(block) < blocks:
            linears.append(tensor.name)
    return frozenset(linears)


def check_options(settings: Export) -> None:
    """Accept all options: none of them needs another program."""


def unpack(packed: Path, out: Path | None = None) -> Path:
    """Write the plain GGUF file of a container, byte for byte; beside it by default."""
    container = racgguf.Container.open(packed)
    plain = out or packed.with_suffix(".gguf")
    if plain.resolve() == packed.resolve():
        raise UsageError(
            "wrong-file-name",
            f"{plain} would replace the packed file",
            remedy="name another file with --out",
        )

    refuse_overwrite(plain, container.sha256)
    container.unpack(plain)
    return plain

"""GGUF: llama.cpp's file, written from safetensors with numpy alone, or the packed container of
one.

Source: GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from racdeploy import packing as packings
from racdeploy.errors import UsageError
from racdeploy.export.gguf.architecture import refusal as refusal
from racdeploy.export.gguf.measurement import measure as measure
from racdeploy.export.gguf.programs import companions as companions
from racdeploy.export.gguf.programs import usage as usage
from racdeploy.export.gguf.vocabulary import write_approximated as write_approximated
from racdeploy.export.gguf.writer import export as export
from racdeploy.files.writing import refuse_another
from racdeploy.models.families import Family
from racdeploy.packing import racgguf

BACKEND = "llamacpp"
NEEDS = {"llama_cpp": "llamacpp"}
LIBRARY = "gguf"
COMPARES_F32 = False
OPTIONS = ("accept_token_differences", "importance", "pre_tokenizer", "split_bytes", "tensors")
TOKENIZER_PREFIX = "tokenizer.ggml."
WEIGHT_SUFFIXES = ()


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the file's name, at the top of a bundle; the caller's name says the quant."""
    return PurePosixPath(f"{name}{packings.load_gguf(packing).SUFFIX}")


def is_linear(family: Family, name: str) -> bool:
    """Return whether a tensor of the file is a prunable linear."""
    forms = (family, family.as_per_block()) if family.per_block else (family,)
    weights = [f"{linear}.weight" for linear in family.linears]
    linears = {each for form in forms for name in weights for each in form.list_stored(name)}
    return name.split(".", 2)[-1] in linears


def check_options(**options: object) -> None:
    """Take any: what they ask for needs no other program."""


def unpack(packed: Path, out: Path | None = None) -> Path:
    """Write the GGUF file that a container stands for, byte for byte; beside it by default."""
    container = racgguf.Container.open(packed)
    plain = out or packed.with_suffix(".gguf")
    if plain.resolve() == packed.resolve():
        raise UsageError(
            "wrong-file-name",
            f"{plain} would replace the packed file",
            remedy="name another file with --out",
        )

    refuse_another(plain, container.sha256)
    container.unpack(plain)
    return plain

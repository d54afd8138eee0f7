"""GGUF: the file of llama.cpp, written from safetensors with numpy alone, or the packed container of one.

Tensors are read one at a time and quantized in slabs of rows, so memory stays at the largest tensor as the
checkpoint stores it. The file is whole or absent. Zeros are counted in the bytes that were written, after
dequantizing them.
Source: GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.errors import UsageError
from racdeploy.export import ExportedTensor, ExportResult, Progress
from racdeploy.export.gguf.body import Body, divide
from racdeploy.export.gguf.general import FILE_KEYS, add_value, general_values
from racdeploy.export.gguf.measurement import measure
from racdeploy.export.gguf.ollama import go_template
from racdeploy.export.gguf.parameters import check_parameters, write_parameters
from racdeploy.export.gguf.splits import COUNT_KEY, NUMBER_KEY, TENSORS_KEY, name_part
from racdeploy.export.gguf.tensors import PlannedTensor, plan_tensors
from racdeploy.export.gguf.vocabulary import Vocabulary, adds_bos, read_vocabulary
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.packing import racgguf
from racdeploy.quant import importance as importances
from racdeploy.quant import presets
from racdeploy.quant.importance import Importance
from racdeploy.runtime.template import PromptEncoder
from racdeploy.storage.files import disk_errors, file_sha256, refuse_another, require_space

__all__ = [
    "BACKEND",
    "LIBRARY",
    "NEEDS",
    "OPTIONS",
    "artifact_path",
    "companions",
    "export",
    "is_linear",
    "measure",
    "unpack",
    "usage",
]

BACKEND = "llamacpp"
NEEDS = {"gguf": "gguf", "llama_cpp": "llamacpp"}
LIBRARY = "gguf"
OPTIONS = ("importance", "pre_tokenizer", "split_bytes", "tensors")

_ALIGNMENT = 32
_SLAB_WEIGHTS = 4_194_304
_LEAST_CONTEXT = (
    16_384  # of programs that are told how to run the file: a thought takes thousands of tokens
)
_OWN_KEYS = ("racdeploy.", "general.")


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the file's name, at the top of a bundle; the caller's name says the quant."""
    return PurePosixPath(f"{name}{packings.load_gguf(packing).SUFFIX}")


def is_linear(family: Family, name: str) -> bool:
    """Return whether a tensor of the file is a prunable linear."""
    return name.split(".", 2)[-1] in {
        family.block_tensors[f"{linear}.weight"] for linear in family.linears
    }


def unpack(packed: Path, out: Path | None = None) -> Path:
    """Write the GGUF file that a container stands for, byte for byte; beside it by default.

    Raises:
        ArtifactError: the container is damaged, or no container.
        UsageError: ``out`` is the container itself, or another file than the one to be written is there.
    """
    container = racgguf.Container.open(packed)
    plain = out or packed.with_suffix(".gguf")
    if plain.resolve() == packed.resolve():
        raise UsageError(
            f"{plain} would replace the packed file", remedy="name another file with --out"
        )
    refuse_another(plain, container.sha256)
    container.unpack(plain)
    return plain


def companions(manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Return an Ollama Modelfile, with the chat template in Ollama's own language where it can be said in it.

    The context is raised to where a thought fits, and a completion may fill it: Ollama would cut both far earlier.
    """
    entry = next(entry for entry in manifest.artifacts if entry.format == "gguf")
    settings = manifest.generation
    encoder = PromptEncoder.from_folder(checkpoint.folder)
    tokens = {i: t for t, i in encoder.tokenizer.get_vocab().items()}
    template, reason = go_template(
        encoder.render, encoder.bos_token if adds_bos(checkpoint) else ""
    )
    missing = (
        f"# Ollama has no counterpart of the chat template ({reason}): llama-server --jinja runs it"
    )
    context = min(
        checkpoint.integer("max_position_embeddings"), max(settings.context_tokens, _LEAST_CONTEXT)
    )
    stops = [tokens[i] for i in manifest.tokenizer.eos_ids if i in tokens]
    lines = [
        *(
            ["# Ollama takes one file: llama-gguf-split --merge FIRST OUT, and name OUT here"]
            if _is_split(entry)
            else []
        ),
        f"FROM ./{_plain_name(entry)}",
        f'TEMPLATE """{template}"""' if template else missing,
        f"PARAMETER temperature {settings.temperature:g}",
        f"PARAMETER top_p {settings.top_p:g}",
        *_recommended(checkpoint),
        f"PARAMETER num_ctx {context}",
        f"PARAMETER num_predict {context}",
        *(
            f'PARAMETER stop """{stop}"""' if '"' in stop else f'PARAMETER stop "{stop}"'
            for stop in stops
        ),
    ]
    return {"Modelfile": "\n".join(lines) + "\n"}


def _recommended(checkpoint: Checkpoint) -> list[str]:
    """Return what else the model's authors recommend for sampling."""
    values = checkpoint.tokenizer.generation
    known = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"}
    named = {ollama: values.get(name) for name, ollama in known.items()}
    return [
        f"PARAMETER {n} {v:g}"
        for n, v in named.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    ]


def usage(entry: ArtifactEntry) -> list[str]:
    """Return how other programs run the file."""
    name = _plain_name(entry)
    parts = [f"- The model is in several files; all are needed, and `{name}` is the one to name."]
    return [
        *packings.load(entry.packing).usage(entry.path),
        *(parts if _is_split(entry) else []),
        f"- llama.cpp: `llama-cli -m {name} -cnv`, or `llama-server -m {name} --jinja -c {_LEAST_CONTEXT}`",
        "- Ollama: `ollama create NAME -f Modelfile`",
        f"- LM Studio: `lms import {name}`, and a context length of at least {_LEAST_CONTEXT} when loading it",
    ]


def _is_split(entry: ArtifactEntry) -> bool:
    return (
        sum(
            name.endswith(".gguf") and not name.endswith(importances.SUFFIX) for name in entry.files
        )
        > 1
    )


def _plain_name(entry: ArtifactEntry) -> str:
    """Return the name of the file that llama.cpp and Ollama read: a packed one is unpacked beside itself."""
    return f"{Path(entry.path).stem}.gguf" if entry.unpacked_sha256 else entry.path


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    quant: str,
    packing: str = "plain",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    pre_tokenizer: str | None = None,
    tensors: Mapping[str, str] | None = None,
    importance: str = "",
    split_bytes: int = 0,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a checkpoint as one file.

    Args:
        checkpoint: the model folder.
        out: the file to write; replaced if it exists.
        quant: number format of the linears, or a preset. Vectors are F32; rows that do not divide into the blocks of a
            format get the next one that they divide into.
        packing: ``plain`` is what llama.cpp reads; any other makes a container that is unpacked first.
        metadata: further keys, ``racdeploy.*`` or ``general.*``.
        pre_tokenizer: llama.cpp's pre-tokenizer name, where it cannot be derived from tokenizer.json.
        tensors: regular expression → number format of the tensors whose names in the file it matches.
        importance: file of an importance matrix; empty takes the one that pruning left, ``none`` takes none.
        split_bytes: most bytes of tensors in one file; where there are more, the model becomes several files, of which
            engines open the first. 0 is never; a packed file is never split.
        progress: called after every slab.

    Raises:
        UsageError: an unknown quant or packing, a wrong suffix, or a metadata key of somebody else.
        ModelError: the checkpoint is damaged or has something that llama.cpp does not compute.
        EnvironmentFailure: the disk is full or not writable.
    """
    packings.check("gguf", quant, packing)
    packer = packings.load_gguf(packing)
    boxed = packer.SUFFIX == racgguf.SUFFIX
    if (out.suffix == racgguf.SUFFIX) != boxed:
        wanted = f"name it {out.stem}{packer.SUFFIX}"
        raise UsageError(f"{out} is no name for a file with packing {packing!r}", remedy=wanted)
    for key in metadata or {}:
        if key in FILE_KEYS or not key.startswith(_OWN_KEYS):
            raise UsageError(
                f"metadata key {key!r} is the exporter's; give racdeploy.* or general.* keys"
            )
    check_parameters(checkpoint)
    mix = presets.read(quant, tensors)
    plan = plan_tensors(checkpoint, mix)
    known = importances.find(checkpoint.folder, importance)
    vocabulary, general = (
        read_vocabulary(checkpoint, pre_tokenizer),
        general_values(checkpoint, mix, metadata or {}),
    )
    vocabulary.check_name(general["general.name"])
    total_bytes = sum(tensor.size_bytes for tensor in plan)
    require_space(out.parent, total_bytes, "choose another place with --out")
    parts = divide(plan, 0 if boxed else split_bytes)
    outs = [
        out.with_name(name_part(out.stem, n, len(parts))) if parts[1:] else out
        for n in range(len(parts))
    ]
    partials = [file.with_name(f".{file.name}.plain.partial") for file in outs]
    body = Body(checkpoint, known, total_bytes, progress)
    written: list[ExportedTensor] = []
    try:
        with disk_errors(out):
            for number, (part, partial) in enumerate(zip(parts, partials, strict=True)):
                values = general if number == 0 else {}
                split = (number, len(parts), len(plan)) if parts[1:] else None
                _write_header(
                    checkpoint, partial, part, vocabulary if number == 0 else None, values, split
                )
                written += body.append(partial, part)
            files = {
                file.name: file_sha256(partial)
                for file, partial in zip(outs, partials, strict=True)
            }
            size_bytes = sum(partial.stat().st_size for partial in partials)
            notes = (*vocabulary.notes, *_importance_notes(known, plan))
            result = ExportResult(outs[0], tuple(written), size_bytes, files, notes)
            for file, partial in zip(outs, partials, strict=True):
                rows = packer.pack_file(partial, file)
            if rows:
                result = _describe_packed(result, packing, rows)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    if known and known.is_own:
        matrix = out.with_name(out.stem + importances.SUFFIX)
        known.write_imatrix(matrix, {tensor.source: tensor.name for tensor in plan})
        result = replace(result, files={**result.files, matrix.name: file_sha256(matrix)})
    return result


def _importance_notes(known: Importance | None, plan: list[PlannedTensor]) -> list[str]:
    """Return how many matrices have scales that an importance chose.

    Raises:
        UsageError: it is of another model.
    """
    if known is None:
        return []
    coded = [tensor for tensor in plan if quants.load(tensor.quant_real).BLOCK > 1]
    weighed = [t for t in coded if known.of(t.name, t.source, t.shape[-1]) is not None]
    if coded and not weighed:
        raise UsageError(
            f"{known.file} names no tensor of this model", remedy="leave export.importance out"
        )
    return [
        f"scales of {len(weighed)} of {len(coded)} quantized matrices are chosen by the importance of their inputs"
    ]


def _describe_packed(
    result: ExportResult, packing: str, rows: tuple[racgguf.PackedTensor, ...]
) -> ExportResult:
    """Return the result of a plain file with what packing made of each tensor."""
    tensors = tuple(
        replace(
            tensor,
            size_bytes=row.stored_bytes,
            packing="plain" if row.reason else packing,
            packing_reason=row.reason,
        )
        for tensor, row in zip(result.tensors, rows, strict=True)
    )
    return replace(
        result,
        tensors=tensors,
        size_bytes=result.path.stat().st_size,
        files={result.path.name: file_sha256(result.path)},
        unpacked_sha256=result.sha256,
    )


def _write_header(
    checkpoint: Checkpoint,
    partial: Path,
    plan: list[PlannedTensor],
    vocabulary: Vocabulary | None,
    general: Mapping[str, Any],
    split: tuple[int, int, int] | None,
) -> None:
    """Write the header of a file: of the only one or the first with all metadata, of a later one with its number.

    Args:
        checkpoint: the model folder.
        partial: the file.
        plan: its tensors.
        vocabulary: None in a later file.
        general: further keys.
        split: which file of how many it is, and how many tensors there are in all; None for a single one.
    """
    writer = GGUFWriter(partial, checkpoint.family.gguf_arch)
    try:
        for key, value in general.items():
            add_value(writer, key, value)
        if vocabulary:
            write_parameters(writer, checkpoint)
            vocabulary.write(writer, checkpoint.tokenizer.chat_template)
        if split:
            number, count, tensors = split
            writer.add_uint16(NUMBER_KEY, number)
            writer.add_uint16(COUNT_KEY, count)
            writer.add_int32(TENSORS_KEY, tensors)
        for tensor in plan:
            raw_dtype = GGMLQuantizationType(quants.load_ggml(tensor.quant_real).GGML_TYPE)
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                tensor.size_bytes,
                raw_dtype=raw_dtype,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()

"""GGUF: the file of llama.cpp, written from safetensors with numpy alone, or the packed container of one.

Tensors are read one at a time and quantized in slabs of rows, so memory stays at the largest tensor as the
checkpoint stores it. The file is whole or absent. Zeros are counted in the bytes that were written, after
dequantizing them.
Source: GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy import racgguf
from racdeploy.artifacts import ArtifactEntry, Manifest, disk_errors
from racdeploy.checkpoint import Checkpoint, file_sha256
from racdeploy.errors import EnvironmentFailure, ModelError, UsageError
from racdeploy.export import ExportedTensor, ExportResult, Progress, _importance
from racdeploy.export._gguf_measure import measure
from racdeploy.export._gguf_parameters import check_parameters, write_parameters
from racdeploy.export._gguf_tensors import PlannedTensor, iterate_slabs, plan_tensors
from racdeploy.export._importance import Importance
from racdeploy.export._vocabulary import Vocabulary, read_vocabulary
from racdeploy.families import Family
from racdeploy.quant import presets
from racdeploy.runtime.template import PromptEncoder

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
OPTIONS = ("importance", "pre_tokenizer", "tensors")

_ALIGNMENT = 32
_SLAB_WEIGHTS = 4_194_304
_OWN_KEYS = ("racdeploy.", "general.")
_FILE_KEYS = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
)


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the file's name, at the top of a bundle; the caller's name says the quant."""
    return PurePosixPath(f"{name}{_suffix(packing)}")


def is_linear(family: Family, name: str) -> bool:
    """Return whether a tensor of the file is a prunable linear."""
    return name.split(".", 2)[-1] in {family.block_tensors[f"{linear}.weight"] for linear in family.linears}


def unpack(packed: Path, out: Path | None = None) -> Path:
    """Write the GGUF file that a container stands for, byte for byte; beside it by default.

    Raises:
        ArtifactError: the container is damaged, or no container.
        UsageError: ``out`` is the container itself.
    """
    container = racgguf.Container.open(packed)
    plain = out or packed.with_suffix(".gguf")
    if plain.resolve() == packed.resolve():
        raise UsageError(f"{plain} would replace the packed file", remedy="name another file with --out")
    container.unpack(plain)
    return plain


def companions(manifest: Manifest, checkpoint: Checkpoint) -> dict[str, str]:
    """Return an Ollama Modelfile; the chat template is in the GGUF."""
    settings = manifest.generation
    tokens = {i: t for t, i in PromptEncoder.from_folder(checkpoint.folder).tokenizer.get_vocab().items()}
    lines = [
        f"FROM ./{_plain_name(manifest.artifacts[0])}",
        f"PARAMETER temperature {settings.temperature:g}",
        f"PARAMETER top_p {settings.top_p:g}",
        f"PARAMETER num_ctx {settings.context_tokens}",
        f"PARAMETER num_predict {settings.max_new_tokens}",
        *(f'PARAMETER stop "{tokens[i]}"' for i in manifest.tokenizer.eos_ids if i in tokens),
    ]
    return {"Modelfile": "\n".join(lines) + "\n"}


def usage(entry: ArtifactEntry) -> list[str]:
    """Return how other programs run the file."""
    unpacking = [f"Unpack it for other programs: `racdeploy unpack {entry.path}`", ""] if entry.unpacked_sha256 else []
    run = f"llama.cpp: `llama-cli -m {_plain_name(entry)} -cnv` · Ollama: `ollama create NAME -f Modelfile`"
    return [*unpacking, run]


def _suffix(packing: str) -> str:
    return ".gguf" if packing == "plain" else racgguf.SUFFIX


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
        progress: called after every slab.

    Raises:
        UsageError: an unknown quant or packing, a wrong suffix, or a metadata key of somebody else.
        ModelError: the checkpoint is damaged or has something that llama.cpp does not compute.
        EnvironmentFailure: the disk is full or not writable.
    """
    packings.check("gguf", quant, packing)
    if (out.suffix == racgguf.SUFFIX) == (packing == "plain"):
        wanted = f"name it {out.stem}{_suffix(packing)}"
        raise UsageError(f"{out} is no name for a file with packing {packing!r}", remedy=wanted)
    for key in metadata or {}:
        if key in _FILE_KEYS or not key.startswith(_OWN_KEYS):
            raise UsageError(f"metadata key {key!r} is the exporter's; give racdeploy.* or general.* keys")
    check_parameters(checkpoint)
    mix = presets.read(quant, tensors)
    plan = plan_tensors(checkpoint, mix)
    known = _importance.find(checkpoint.folder, importance)
    vocabulary = read_vocabulary(checkpoint, pre_tokenizer)
    _check_space(out, sum(tensor.size_bytes for tensor in plan))
    partial = out.with_name(f".{out.name}.plain.partial")
    try:
        with disk_errors(out):
            _write_header(checkpoint, partial, plan, vocabulary, _general(checkpoint, mix, metadata or {}))
            written = _write_tensors(checkpoint, partial, plan, known, progress)
            files = {out.name: file_sha256(partial)}
            notes = (*vocabulary.notes, *_importance_notes(known, plan))
            result = ExportResult(out, written, partial.stat().st_size, files, notes)
            if packing == "plain":
                partial.replace(out)
            else:
                result = _pack(partial, result, packing)
    finally:
        partial.unlink(missing_ok=True)
    if known and known.is_own:
        matrix = out.with_name(out.stem + _importance.SUFFIX)
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
        raise UsageError(f"{known.file} names no tensor of this model", remedy="leave export.importance out")
    return [f"scales of {len(weighed)} of {len(coded)} quantized matrices are chosen by the importance of their inputs"]


def _pack(plain: Path, result: ExportResult, packing: str) -> ExportResult:
    """Pack a finished file, and return the result with what that made of each tensor."""
    rows = {row.name: row for row in racgguf.pack(plain, result.path)}
    tensors = tuple(
        replace(
            tensor,
            size_bytes=rows[tensor.name].stored_bytes,
            packing="plain" if rows[tensor.name].reason else packing,
            packing_reason=rows[tensor.name].reason,
        )
        for tensor in result.tensors
    )
    return replace(
        result,
        tensors=tensors,
        size_bytes=result.path.stat().st_size,
        files={result.path.name: file_sha256(result.path)},
        unpacked_sha256=result.sha256,
    )


def _general(checkpoint: Checkpoint, mix: presets.Mix, metadata: Mapping[str, Any]) -> dict[str, Any]:
    general: dict[str, Any] = {"general.type": "model", "general.name": checkpoint.folder.resolve().name}
    if checkpoint.license:
        general["general.license"] = checkpoint.license
    return {
        **general,
        **metadata,
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.file_type": _file_type(mix),
    }


def _file_type(mix: presets.Mix) -> int:
    """Return llama.cpp's number for a file that is mostly of one type; it is only shown, never decides."""
    for upper in (mix.name.upper(), mix.quant.upper()):
        for name in (f"ALL_{upper}", f"MOSTLY_{upper}", f"MOSTLY_{upper}_S"):
            if name in LlamaFileType.__members__:
                return int(LlamaFileType[name])
    return int(LlamaFileType.GUESSED)


def _write_header(
    checkpoint: Checkpoint,
    partial: Path,
    plan: list[PlannedTensor],
    vocabulary: Vocabulary,
    general: Mapping[str, Any],
) -> None:
    writer = GGUFWriter(partial, checkpoint.family.gguf_arch)
    try:
        for key, value in general.items():
            _add_value(writer, key, value)
        write_parameters(writer, checkpoint)
        _add_vocabulary(writer, vocabulary, checkpoint.chat_template)
        for tensor in plan:
            raw_dtype = GGMLQuantizationType(quants.load_ggml(tensor.quant_real).GGML_TYPE)
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, raw_dtype=raw_dtype
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_value(writer: GGUFWriter, key: str, value: str | int | float | bool) -> None:
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


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, chat_template: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
        "eot": writer.add_eot_token_id,
    }
    for kind, i in vocabulary.special_ids.items():
        add_id[kind](i)
    writer.add_add_bos_token(vocabulary.adds["bos"])
    writer.add_add_eos_token(vocabulary.adds["eos"])
    writer.add_chat_template(chat_template)


def _write_tensors(
    checkpoint: Checkpoint,
    partial: Path,
    plan: list[PlannedTensor],
    importance: Importance | None,
    progress: Progress | None,
) -> tuple[ExportedTensor, ...]:
    total_bytes = _padded(partial.stat().st_size) + sum(_padded(tensor.size_bytes) for tensor in plan)
    tensors = []
    with partial.open("ab") as stream:
        _pad(stream)
        for tensor in plan:
            zeros = _write_tensor(checkpoint, stream, tensor, importance, progress, total_bytes)
            _pad(stream)
            tensors.append(
                ExportedTensor(
                    tensor.name,
                    tensor.source,
                    tensor.shape,
                    tensor.quant_asked,
                    tensor.quant_real,
                    tensor.reason,
                    zeros / max(1, int(np.prod(tensor.shape))),
                    tensor.size_bytes,
                )
            )
        stream.flush()
        os.fsync(stream.fileno())
    return tuple(tensors)


def _write_tensor(
    checkpoint: Checkpoint,
    stream: BinaryIO,
    tensor: PlannedTensor,
    importance: Importance | None,
    progress: Progress | None,
    total_bytes: int,
) -> int:
    """Write one tensor and return how many zeros the written bytes hold."""
    quant, zeros = quants.load_ggml(tensor.quant_real), 0
    known_I = importance.of(tensor.name, tensor.source, tensor.shape[-1]) if importance else None
    for weight_OI in iterate_slabs(checkpoint, tensor, _SLAB_WEIGHTS):
        packed_OP = quant.quantize(weight_OI, known_I)
        stored_OI = quant.dequantize(packed_OP, weight_OI.shape[1])
        _check_finite(tensor, weight_OI, stored_OI)
        zeros += stored_OI.size - int(np.count_nonzero(stored_OI))
        stream.write(np.ascontiguousarray(packed_OP).data)
        if progress is not None:
            progress(stream.tell(), total_bytes)
    return zeros


def _check_finite(tensor: PlannedTensor, weight_OI: NDArray[np.float32], stored_OI: NDArray[np.float32]) -> None:
    if np.isfinite(stored_OI).all():
        return
    if np.isfinite(weight_OI).all():
        raise ModelError(
            f"{tensor.source!r} has weights up to {float(np.abs(weight_OI).max()):g},"
            f" too large for {tensor.quant_real}",
            remedy="export with quant bf16 or f32",
        )
    raise ModelError(
        f"{tensor.source!r} holds weights that are infinite or not a number",
        remedy="the checkpoint is damaged or its training diverged",
    )


def _check_space(out: Path, needed_bytes: int) -> None:
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is not a folder", remedy=f"mkdir -p {out.parent}")
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        raise EnvironmentFailure(
            f"{out} needs {needed_bytes / 1e6:.0f} MB and its disk has {free_bytes / 1e6:.0f} MB free",
            remedy="free some space or choose another place with --out",
        )


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(_padded(stream.tell()) - stream.tell()))


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT

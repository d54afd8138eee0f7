"""Write a checkpoint as a GGUF file: check, plan, write the parts, publish or pack them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.export import (
    Deviation,
    ExportedTensor,
    ExportResult,
    Metadata,
    Progress,
    check_metadata,
)
from racdeploy.export.gguf.architecture import list_deviations
from racdeploy.export.gguf.body import Body, divide
from racdeploy.export.gguf.header import FILE_KEYS, list_general_values, write_header
from racdeploy.export.gguf.parameters import check_parameters
from racdeploy.export.gguf.splits import name_part
from racdeploy.export.gguf.tensors import PlannedTensor, plan_tensors
from racdeploy.export.gguf.vocabulary import Vocabulary, read_vocabulary
from racdeploy.files.partials import partial_folder
from racdeploy.files.writing import disk_errors, file_sha256, require_space
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing import racgguf
from racdeploy.quant import importance as importances
from racdeploy.quant import presets
from racdeploy.quant.importance import Importance

_ROUNDED_RAMP = (
    "llama.cpp lets YaRN's ramp begin and end at whole dimensions, for which this model does not "
    "ask: rotations differ by a little, as in every GGUF file of this family"
)


@dataclass(frozen=True)
class Plan:
    """What is decided before the first byte is written: among others the tensors of each file."""

    tensors: list[PlannedTensor]
    parts: Mapping[Path, list[PlannedTensor]]
    vocabulary: Vocabulary
    general: Mapping[str, Any]
    importance: Importance | None
    notes: tuple[str, ...]
    deviations: tuple[Deviation, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    quant: str,
    packing: str = "plain",
    metadata: Metadata | None = None,
    pre_tokenizer: str | None = None,
    accept_token_differences: float = 0.0,
    tensors: Mapping[str, str] | None = None,
    importance: str = "",
    split_bytes: int = 0,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a checkpoint as one file, or as several.

    Args:
        out: the file to write; replaced if it exists.
        quant: number format of the linears, or a preset. Vectors are F32; rows that do not divide
            into the blocks of a format get the next one that they divide into.
        packing: ``plain`` is what llama.cpp reads; any other is a container, unpacked first.
        metadata: further keys, ``racdeploy.*`` or ``general.*``.
        pre_tokenizer: llama.cpp's name, where it cannot be derived from tokenizer.json.
        accept_token_differences: share of hard strings that may differ, which the caller counts;
            above 0 the nearest pre-tokenizer will do where llama.cpp has no equal.
        tensors: regular expression, of names in the file → number format.
        importance: file of an importance matrix; empty takes that of pruning, ``none`` none.
        split_bytes: most bytes of tensors in one file of several; 0, and packed: never split.
    """
    _check_request(out, quant, packing, metadata or {})
    check_parameters(checkpoint.shape)

    mix = presets.read(quant, tensors)
    known = importances.find(checkpoint.folder, importance)

    approximate = accept_token_differences > 0
    vocabulary = read_vocabulary(checkpoint, pre_tokenizer, approximate=approximate)
    plan = make_plan(checkpoint, out, mix, known, vocabulary, metadata or {}, split_bytes)
    require_space(out.parent, plan.total_bytes, "choose another place with --out")

    with disk_errors(out), partial_folder(out) as scratch:
        partials = {file: scratch / file.name for file in plan.parts}
        written = _write_parts(checkpoint, plan, partials, progress)
        result = _publish(plan, partials, written, packing)

    if known and known.file.name == quants.IMPORTANCE_FILE:  # not somebody's own file
        result = _add_importance(result, known, plan, out)

    return result


def _check_request(out: Path, quant: str, packing: str, metadata: Metadata) -> None:
    packings.check("gguf", quant, packing)
    suffix = packings.load_gguf(packing).SUFFIX
    if (out.suffix == racgguf.SUFFIX) != (suffix == racgguf.SUFFIX):
        raise UsageError(
            "wrong-file-name",
            f"{out} is no name for a file with packing {packing!r}",
            remedy=f"name it {out.stem}{suffix}",
        )

    check_metadata(metadata, FILE_KEYS)


def make_plan(
    checkpoint: Checkpoint,
    out: Path,
    mix: presets.Mix,
    importance: Importance | None,
    vocabulary: Vocabulary,
    metadata: Metadata,
    split_bytes: int,
) -> Plan:
    """Decide all of a file before it is written; the arguments are those of :func:`export`."""
    tensors = plan_tensors(checkpoint, mix)
    if out.suffix == racgguf.SUFFIX:
        split_bytes = 0
    divided = divide(tensors, split_bytes)
    parts = {out: tensors}
    if len(divided) > 1:
        names = (name_part(out.stem, number, len(divided)) for number in range(len(divided)))
        parts = dict(zip(map(out.with_name, names), divided, strict=True))

    general = list_general_values(checkpoint, mix, metadata)
    vocabulary.check_name(general["general.name"])

    notes = vocabulary.notes
    if importance:
        chosen = [tensor for tensor in tensors if not tensor.list_packed(checkpoint)]
        notes = (*notes, _describe_importance(importance, chosen))
    if checkpoint.shape.rounds_ramp:
        notes = (*notes, _ROUNDED_RAMP)

    deviations = list_deviations(checkpoint)
    return Plan(
        tensors=tensors,
        parts=parts,
        vocabulary=vocabulary,
        general=general,
        importance=importance,
        notes=notes,
        deviations=deviations,
    )


def _describe_importance(known: Importance, plan: list[PlannedTensor]) -> str:
    """Return how many matrices have scales that an importance chose, or refuse another model's."""
    coded = [tensor for tensor in plan if quants.load(tensor.quant_real).BLOCK > 1]
    weighed = []
    for tensor in coded:
        if any(row_I is not None for row_I in tensor.importances(known)):
            weighed.append(tensor)
    if coded and not weighed:
        raise ArtifactError(
            "importance-of-other-model",
            f"{known.file} names no tensor of this model",
            remedy="leave export.importance out",
        )

    return (
        f"scales of {len(weighed)} of {len(coded)} quantized matrices are chosen by the importance"
        " of their inputs"
    )


def _write_parts(
    checkpoint: Checkpoint, plan: Plan, partials: Mapping[Path, Path], progress: Progress | None
) -> tuple[ExportedTensor, ...]:
    body = Body(checkpoint, plan.importance, plan.total_bytes, progress)

    written: list[ExportedTensor] = []

    for number, (file, tensors) in enumerate(plan.parts.items()):
        is_first = number == 0
        write_header(
            checkpoint,
            partials[file],
            tensors,
            vocabulary=plan.vocabulary if is_first else None,
            general=plan.general if is_first else {},
            split=(number, len(plan.parts), len(plan.tensors)),
        )

        written += body.append(partials[file], tensors)

    return tuple(written)


def _publish(
    plan: Plan, partials: Mapping[Path, Path], written: tuple[ExportedTensor, ...], packing: str
) -> ExportResult:
    plain = ExportResult(
        path=next(iter(partials)),
        tensors=written,
        size_bytes=sum(partial.stat().st_size for partial in partials.values()),
        files={file.name: file_sha256(partial) for file, partial in partials.items()},
        notes=plan.notes,
        deviations=plan.deviations,
    )

    packer = packings.load_gguf(packing)

    rows: tuple[racgguf.PackedTensor, ...] = ()

    for file, partial in partials.items():
        rows += packer.pack_file(partial, file)

    if rows:
        return _describe_packed(plain, packing, rows)
    return plain


def _describe_packed(
    plain: ExportResult, packing: str, rows: tuple[racgguf.PackedTensor, ...]
) -> ExportResult:
    tensors = []
    for tensor, row in zip(plain.tensors, rows, strict=True):
        real = "plain" if row.reason else packing
        packed = replace(tensor, size_bytes=row.stored_bytes, packing=real)
        tensors.append(replace(packed, packing_reason=row.reason))

    return replace(
        plain,
        tensors=tuple(tensors),
        size_bytes=plain.path.stat().st_size,
        files={plain.path.name: file_sha256(plain.path)},
        unpacked_sha256=plain.sha256,
    )


def _add_importance(result: ExportResult, known: Importance, plan: Plan, out: Path) -> ExportResult:
    """Leave the importance beside the model, for those who quantize it again."""
    matrix = out.with_name(out.stem + importances.SUFFIX)
    names = {}
    for tensor in plan.tensors:
        names[tensor.name] = tensor.parts if tensor.transform == "stack" else (tensor.source,)
    known.write_imatrix(matrix, names)
    return replace(result, files={**result.files, matrix.name: file_sha256(matrix)})

"""Export a checkpoint as a GGUF file: check, plan, write the parts, move or pack them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.errors import UsageError
from racdeploy.exporting import (
    ExportedTensor,
    ExportResult,
    Metadata,
    WriteProgress,
    check_metadata,
)
from racdeploy.exporting.gguf.architecture import find_architecture
from racdeploy.exporting.gguf.header import RESERVED_KEYS, make_general_metadata, write_header
from racdeploy.exporting.gguf.parameters import check_parameters
from racdeploy.exporting.gguf.splits import assign_files
from racdeploy.exporting.gguf.tensor_writer import TensorWriter
from racdeploy.exporting.gguf.tensors import (
    GgufTensorPlan,
    describe_importance,
    plan_tensors,
)
from racdeploy.exporting.gguf.tokenizer import read_vocabulary
from racdeploy.exporting.gguf.vocabulary import Vocabulary
from racdeploy.files.partials import partial_folder
from racdeploy.files.writing import disk_errors, file_sha256, require_space
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.packing import racgguf
from racdeploy.quant import importance as importances
from racdeploy.quant import presets
from racdeploy.quant.importance import Importance
from racdeploy.results.pruning import DeviationRow

_ROUNDED_RAMP = (
    "llama.cpp begins and ends YaRN's ramp at whole dimensions, and this model does not: rotations "
    "differ by a little, as in every GGUF file of this family"
)


@dataclass(frozen=True)
class GgufPlan:
    """Plan of an export, made before the first byte is written.

    Args:
        family: with the architecture of the file.
        tensors_by_file: the tensors of each file.
        general: metadata keys in file order.
    """

    family: Family
    tensors: list[GgufTensorPlan]
    tensors_by_file: Mapping[Path, list[GgufTensorPlan]]
    vocabulary: Vocabulary
    general: Mapping[str, Any]
    importance: Importance | None
    notes: tuple[str, ...]
    deviations: tuple[DeviationRow, ...]

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
    progress: WriteProgress | None = None,
) -> ExportResult:
    """Export a checkpoint as one GGUF file, or as several.

    Args:
        out: the file to write; replaced if it exists.
        quant: number format of the linears, or a preset. Vectors are F32; rows that do not divide
            into the blocks of a format get a format with smaller blocks.
        packing: ``plain`` is read by llama.cpp; any other is a container, which is unpacked first.
        metadata: additional keys, ``racdeploy.*`` or ``general.*``.
        pre_tokenizer: llama.cpp's name, if it cannot be found from tokenizer.json.
        accept_token_differences: fraction of hard strings that may be tokenized differently, 0 to
            1, which the caller counts; above 0 the nearest pre-tokenizer is accepted.
        tensors: regular expression for names in the file → number format.
        importance: file of an importance matrix; empty: the one from pruning; ``none``: none.
        split_bytes: maximum bytes of tensors in a file; 0: one file, as always if packed.
    """
    _check_request(out, quant, packing, metadata or {})
    check_parameters(checkpoint.shape)

    mix = presets.read(quant, tensors)
    known = importances.find_importance(checkpoint.folder, importance)

    approximate = accept_token_differences > 0
    vocabulary = read_vocabulary(checkpoint, pre_tokenizer, approximate=approximate)
    plan = make_plan(
        checkpoint,
        out,
        mix,
        vocabulary,
        importance=known,
        metadata=metadata or {},
        split_bytes=split_bytes,
    )
    require_space(out.parent, plan.total_bytes, "choose another place with --out")

    with disk_errors(out), partial_folder(out) as scratch:
        partials = {file: scratch / file.name for file in plan.tensors_by_file}
        written = _write_parts(checkpoint, plan, partials, progress)
        result = _publish(plan, partials, written, packing)

    if known and known.file.name == quants.IMPORTANCE_FILE:  # not a file that the user named
        # Write the importance beside the model, for quantizing it again with llama.cpp.
        matrix = out.with_name(out.stem + quants.IMATRIX_SUFFIX)
        names = {tensor.name: tensor.importance_sources for tensor in plan.tensors}
        known.write_imatrix(matrix, names)
        result = replace(result, files={**result.files, matrix.name: file_sha256(matrix)})

    return result


def _check_request(out: Path, quant: str, packing: str, metadata: Metadata) -> None:
    packings.check("gguf", quant, packing)
    suffix = packings.load_gguf(packing).SUFFIX
    if out.suffix != suffix:
        raise UsageError(
            "wrong-file-name",
            f"{out} has the wrong suffix for packing {packing!r}",
            remedy=f"name it {out.stem}{suffix}",
        )

    check_metadata(metadata, RESERVED_KEYS)


def make_plan(
    checkpoint: Checkpoint,
    out: Path,
    mix: presets.QuantRules,
    vocabulary: Vocabulary,
    *,
    importance: Importance | None = None,
    metadata: Metadata,
    split_bytes: int,
) -> GgufPlan:
    """Return the plan of an export; arguments as in :func:`export`."""
    architecture = find_architecture(checkpoint)
    tensors = plan_tensors(checkpoint, architecture.family, mix)
    if out.suffix == racgguf.SUFFIX:  # a container holds one file
        split_bytes = 0

    tensors_by_file = assign_files(out, tensors, split_bytes)

    general = make_general_metadata(checkpoint, mix, metadata)
    deviations = (architecture.deviation,) if architecture.deviation else ()
    for deviation in deviations:  # who inspects the file finds another architecture
        key = f"racdeploy.{deviation.subject}"
        general[key] = f"{deviation.requested}: {deviation.reason}"
    vocabulary.check_model_name(general["general.name"])

    notes = vocabulary.notes
    if importance:
        packed = {tensor.name for tensor in tensors if tensor.packed_parts}
        notes = (*notes, *describe_importance(importance, tensors, packed))
    if checkpoint.shape.rounds_yarn_ramp:
        notes = (*notes, _ROUNDED_RAMP)

    return GgufPlan(
        family=architecture.family,
        tensors=tensors,
        tensors_by_file=tensors_by_file,
        vocabulary=vocabulary,
        general=general,
        importance=importance,
        notes=notes,
        deviations=deviations,
    )


def _write_parts(
    checkpoint: Checkpoint,
    plan: GgufPlan,
    partials: Mapping[Path, Path],
    progress: WriteProgress | None,
) -> tuple[ExportedTensor, ...]:
    body = TensorWriter(plan.importance, plan.total_bytes, progress)
    written = []
    for number, (file, tensors) in enumerate(plan.tensors_by_file.items()):
        write_header(
            checkpoint,
            plan.family,
            partials[file],
            tensors,
            vocabulary=None if number else plan.vocabulary,
            general={} if number else plan.general,
            split=(number, len(plan.tensors_by_file), len(plan.tensors)),
        )

        written += body.append_tensors(partials[file], tensors)

    return tuple(written)


def _publish(
    plan: GgufPlan, partials: Mapping[Path, Path], written: tuple[ExportedTensor, ...], packing: str
) -> ExportResult:
    plain = ExportResult(
        path=next(iter(partials)),
        tensors=written,
        size_bytes=sum(partial.stat().st_size for partial in partials.values()),
        files={file.name: file_sha256(partial) for file, partial in partials.items()},
        notes=plan.notes,
        deviations=plan.deviations,
    )

    # The plain file is hashed above, before the packing moves it or removes it.
    packer = packings.load_gguf(packing)
    rows: tuple[racgguf.PackedTensor, ...] = ()
    for file, partial in partials.items():
        rows += packer.pack_file(partial, file)

    if rows:
        tensors = []
        for tensor, row in zip(plain.tensors, rows, strict=True):
            packed = replace(tensor, size_bytes=row.stored_bytes, packing_reason=row.reason)
            tensors.append(packed if row.reason else replace(packed, packing=packing))
        return replace(
            plain,
            tensors=tuple(tensors),
            size_bytes=plain.path.stat().st_size,
            files={plain.path.name: file_sha256(plain.path)},
            unpacked_sha256=plain.sha256,
        )
    return plain

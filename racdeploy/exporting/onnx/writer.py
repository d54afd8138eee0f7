"""Export a checkpoint as an ONNX graph: check, choose the graph, write its tensors, move the files.

The weights are written from the checkpoint, not from the exporter's graph, one tensor at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

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
from racdeploy.exporting.onnx.client_files import list_client_notes
from racdeploy.exporting.onnx.exporter_choice import check_exporter, export_verified_graph
from racdeploy.exporting.onnx.padding import count_padded_weights
from racdeploy.exporting.onnx.weights import (
    OnnxTensorPlan,
    connect_weights,
    plan_tensors,
    quantize_tensor,
)
from racdeploy.files.partials import partial_folder
from racdeploy.files.writing import disk_errors, file_sha256, require_space
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.file import write_model
from racdeploy.packing.onnx.packer import BaseGraphPacker, data_name
from racdeploy.packing.onnx.tensors import TENSORS_KEY, dump_tensors
from racdeploy.sparse_kernels import accel_name


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    quant: str,
    packing: str = "plain",
    metadata: Metadata | None = None,
    exporter: str = "auto",
    progress: WriteProgress | None = None,
) -> ExportResult:
    """Export a checkpoint as an ONNX graph.

    Args:
        out: replaced if it exists; weights of more than 500 MB go to ``OUT_data`` beside it.
        quant: number format of the linears. Vectors are f32; embedding and output keep at least
            8 bits; rows that do not divide into blocks are f16.
        metadata: additional properties of the graph, ``racdeploy.*`` or ``general.*``.
        exporter: name of an exporter; ``auto`` takes the fastest graph that passes.

    Raises:
        UsageError: quant, packing, exporter, suffix or a metadata key is not allowed.
        ModelError: the checkpoint is damaged, or no exporter can export it.
        MissingExtraError: an exporter is not installed.
        EnvironmentFailure: the disk is full or not writable.
    """
    metadata = metadata or {}
    check_exporter(exporter)
    _check_request(out, quant, packing, metadata)
    _check_room(checkpoint, out, quant)
    packings.load_onnx(packing).GraphPacker.check_size(checkpoint.parameters)
    exported = export_verified_graph(checkpoint, exporter)
    plan = plan_tensors(checkpoint, exported.graph, quant)

    with disk_errors(out), partial_folder(out) as scratch:
        model = connect_weights(exported.graph, [tensor.tensor for tensor in plan])
        packer = packings.load_onnx(packing).GraphPacker(model, scratch / out.name)
        writer = _Writer(checkpoint, plan, packing, packer)

        properties = {"general.name": checkpoint.folder.resolve().name}
        if checkpoint.license:
            properties["general.license"] = checkpoint.license
        properties |= {key: str(value) for key, value in metadata.items()}

        arrays = chain(exported.graph.constants.items(), writer.encode_all(progress))
        write_model(
            model, arrays, scratch, out.name, metadata=lambda: properties | writer.dump_tensors()
        )

        notes = [exported.note, *list_client_notes(checkpoint.shape), *writer.packer.after_write()]
        files = _move_in(scratch, out)

    # An accelerated graph is not counted: other programs do not read it.
    accel = accel_name(out.name)
    read = [out.parent / name for name in files if not name.startswith(accel)]
    return ExportResult(
        path=out,
        tensors=tuple(writer.tensors),
        size_bytes=sum(file.stat().st_size for file in read),
        files=files,
        notes=tuple(notes),
    )


class _Writer:
    """Writer of the tensors of one graph; ``tensors`` has each as it was written.

    If the packed form is an extra file beside a plain graph, the graph itself is not packed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: list[OnnxTensorPlan],
        packing: str,
        packer: BaseGraphPacker,
    ) -> None:
        self.packer = packer
        self._keeps_plain_file = packings.load_onnx(packing).KEEPS_PLAIN_FILE
        self.tensors: list[ExportedTensor] = []
        self._checkpoint = checkpoint
        self._plan = plan
        self._packing = packing

    def encode_all(self, progress: WriteProgress | None) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield name and values of every array of the file, and record each tensor."""
        total = sum(math.prod(planned.tensor.shape) for planned in self._plan)
        done = 0

        def advance(weights: int) -> None:
            nonlocal done
            done += weights
            if progress is not None:
                progress(done, total)

        for planned in self._plan:
            tensor = planned.tensor
            arrays, zero_count = quantize_tensor(self._checkpoint, tensor, advance)
            zeros = zero_count / math.prod(tensor.shape)
            reason = self.packer.reason_for_plain(tensor, zeros)

            # A tensor that is better stored plain is a plain one of the same graph.
            if not reason:
                arrays = self.packer.store(tensor, arrays, zeros)
            yield from arrays.items()

            size_bytes = sum(values.nbytes for values in arrays.values())
            self.tensors.append(self._describe(planned, zeros, size_bytes, reason))

    def dump_tensors(self) -> dict[str, str]:
        """Return the metadata property that lists all tensors, after all are written."""
        listed = []
        for planned, tensor in zip(self._plan, self.tensors, strict=True):
            packing = "plain" if self._keeps_plain_file else tensor.packing
            listed.append(replace(planned.tensor, packing=packing))
        return {TENSORS_KEY: dump_tensors(listed)}

    def _describe(
        self, planned: OnnxTensorPlan, zeros: float, size_bytes: int, reason: str
    ) -> ExportedTensor:
        return ExportedTensor(
            name=planned.tensor.name,
            source=planned.tensor.name,
            shape=planned.tensor.shape,
            requested_quant=planned.requested_quant,
            actual_quant=planned.tensor.quant,
            reason=planned.reason,
            zeros=zeros,
            size_bytes=size_bytes,
            packing="plain" if reason else self._packing,
            packing_reason=reason,
        )


def _check_request(out: Path, quant: str, packing: str, metadata: Metadata) -> None:
    packings.check("onnx", quant, packing)
    if out.suffix != ".onnx":
        raise UsageError(
            "wrong-file-name",
            f"{out} does not end in .onnx",
            remedy=f"name it {out.stem}.onnx",
        )

    check_metadata(metadata, (TENSORS_KEY,))


def _check_room(checkpoint: Checkpoint, out: Path, quant: str) -> None:
    """Refuse an export for which the disk has no room, or the temporary folder."""
    weights = checkpoint.parameters
    artifact_bytes = round(quants.load(quant).bits * weights / 8)
    require_space(out.parent, artifact_bytes, "choose another place with --out")

    # The exporter's float32 graph is in the temporary folder until it was compared; beside it the
    # decoded model if weights are codes; if blocks differ in width, the padded one, or its graph.
    passing_bytes = 4 * weights
    if checkpoint.coded or not checkpoint.shape.is_uniform:
        passing_bytes = 8 * count_padded_weights(checkpoint)
    scratch = Path(tempfile.gettempdir())
    require_space(scratch, passing_bytes, "move the temporary folder with TMPDIR")


def _move_in(scratch: Path, out: Path) -> dict[str, str]:
    """Move a finished artifact to its folder, the graph last; return the SHA-256 of its files."""
    # An older artifact may have files that this one lacks; they would be read with the new graph.
    accel = accel_name(out.name)
    for name in (data_name(out.name), accel, data_name(accel)):
        (out.parent / name).unlink(missing_ok=True)

    written = {file.name for file in scratch.iterdir()}
    names = [*sorted(written - {out.name}), out.name]
    for name in names:
        (scratch / name).replace(out.parent / name)

    return {name: file_sha256(out.parent / name) for name in names}

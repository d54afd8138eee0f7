"""Write a checkpoint as an ONNX graph: check, choose the graph, write its tensors, move files in.

The weights in the file are written from the checkpoint itself, one tensor at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.errors import UsageError
from racdeploy.export import ExportedTensor, ExportResult, Metadata, Progress, check_metadata
from racdeploy.export.onnx.choice import check_exporter, choose
from racdeploy.export.onnx.layouts import note_clients
from racdeploy.export.onnx.padding import count_twin_weights
from racdeploy.export.onnx.weights import PlannedTensor, encode, plan_tensors, wire
from racdeploy.files.partials import partial_folder
from racdeploy.files.writing import disk_errors, file_sha256, refuse_another, require_space
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.file import load_graph, read_properties, write_model
from racdeploy.packing.onnx.packer import PACKING_PREFIX, data_name
from racdeploy.packing.onnx.tensors import TENSORS_KEY, StoredArrays, list_tensors, read_tensors

VOCABULARY = frozenset({"model.embed_tokens.weight", "lm_head.weight"})
"""Names of what keeps 8 bits at least."""


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    quant: str,
    packing: str = "plain",
    metadata: Metadata | None = None,
    exporter: str = "auto",
    progress: Progress | None = None,
) -> ExportResult:
    """Write a checkpoint as an ONNX graph.

    Args:
        out: replaced if it exists; above 500 MB its weights go to ``OUT_data`` beside it.
        quant: number format of the linears. Vectors are f32; embedding and output keep at least
            8 bits; rows that do not divide into blocks are f16.
        metadata: further properties of the graph, ``racdeploy.*`` or ``general.*``.
        exporter: who makes the graph; ``auto`` takes the fastest graph that passes.

    Raises:
        UsageError: a quant, packing, exporter, suffix or metadata key that is not allowed.
        ModelError: the checkpoint is damaged, or no exporter can export it.
        MissingExtraError: an exporter is not installed.
        EnvironmentFailure: the disk is full or not writable.
    """
    metadata = metadata or {}
    _check_request(checkpoint, out, quant, packing, metadata, exporter)

    chosen = choose(checkpoint, exporter)
    plan = plan_tensors(checkpoint, chosen.graph, quant, VOCABULARY)

    with disk_errors(out), partial_folder(out) as scratch:
        model = wire(chosen.graph, [tensor.graph for tensor in plan])
        writer = _Writer(checkpoint, plan, packing, model, scratch / out.name)
        properties = _describe_model(checkpoint, metadata)

        arrays = chain(chosen.graph.constants.items(), writer.encode_all(progress))
        write_model(model, arrays, scratch, out.name, lambda: properties | writer.list_tensors())

        notes = [chosen.note, *note_clients(checkpoint.shape), *writer.packer.complete()]
        unpacked_sha256 = ""
        if writer.is_packed:  # of the graph that is restored from what was written
            with partial_folder(scratch / out.name) as again:
                plain = _write_plain(scratch / out.name, again, out.name)
                unpacked_sha256 = file_sha256(plain)
        files = _move_in(scratch, out)

    unread = () if writer.is_packed else writer.packer.files_beside(out.name)
    read = [out.parent / name for name in files if name not in unread]
    return ExportResult(
        path=out,
        tensors=tuple(writer.tensors),
        size_bytes=sum(file.stat().st_size for file in read),
        files=files,
        notes=tuple(notes),
        unpacked_sha256=unpacked_sha256,
    )


def unpack(packed: Path, out: Path | None = None) -> Path:
    """Write the graph that a packed one stands for; ``*.plain.onnx`` by default.

    Raises:
        ArtifactError: it is damaged.
        UsageError: nothing in it is packed, ``out`` is the packed graph itself, or another file
            lies where one is to be written.
    """
    plain = out or packed.with_suffix(".plain.onnx")
    if plain.resolve() == packed.resolve() or plain.suffix != ".onnx":
        raise UsageError(
            "wrong-file-name",
            f"{plain} is no name for the unpacked graph",
            remedy="name another .onnx file with --out",
        )

    if not plain.parent.is_dir():
        raise UsageError(
            "no-out-folder", f"{plain.parent} is not a folder", remedy=f"mkdir -p {plain.parent}"
        )

    with disk_errors(plain), partial_folder(plain) as scratch:
        _write_plain(packed, scratch, plain.name)
        for written in sorted(scratch.iterdir()):
            refuse_another(plain.with_name(written.name), file_sha256(written))
        _move_in(scratch, plain)

    return plain


class _Writer:
    """Writes the tensors of one graph, and remembers what became of each.

    Where the packed form lies beside a plain graph, the graph itself is not packed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: list[PlannedTensor],
        packing: str,
        model: onnx.ModelProto,
        file: Path,
    ) -> None:
        chosen = packings.load_onnx(packing)
        self.packer = chosen.GraphPacker(model, file)
        self.is_packed = packing != "plain" and not chosen.BESIDE_PLAIN
        self.tensors: list[ExportedTensor] = []
        self._plain = packings.load_onnx("plain").GraphPacker(model, file)
        self._checkpoint = checkpoint
        self._plan = plan
        self._packing = packing

    def encode_all(self, progress: Progress | None) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield every array of the file, and describe each tensor as it goes by."""
        total = sum(math.prod(planned.graph.shape) for planned in self._plan)
        done = 0

        def advance(weights: int) -> None:
            nonlocal done
            done += weights
            if progress is not None:
                progress(done, total)

        for planned in self._plan:
            arrays, zero_count = encode(self._checkpoint, planned.graph, advance)
            zeros = zero_count / math.prod(planned.graph.shape)
            reason = self.packer.refusal(planned.graph, zeros)

            storing = self._plain if reason else self.packer
            yield from storing.store(planned.graph, arrays, zeros)
            size_bytes = storing.sizes[planned.graph.name]
            self.tensors.append(self._describe(planned, zeros, size_bytes, reason))

        self.packer.finish()

    def list_tensors(self) -> dict[str, str]:
        """Return the property that names every tensor, once all are written."""
        listed = []
        for planned, tensor in zip(self._plan, self.tensors, strict=True):
            packed = self.is_packed and tensor.packing == self._packing
            listed.append(replace(planned.graph, packing=self._packing if packed else "plain"))
        return {TENSORS_KEY: list_tensors(listed)}

    def _describe(
        self, planned: PlannedTensor, zeros: float, size_bytes: int, reason: str
    ) -> ExportedTensor:
        return ExportedTensor(
            name=planned.graph.name,
            source=planned.graph.name,
            shape=planned.graph.shape,
            quant_asked=planned.quant_asked,
            quant_real=planned.graph.quant,
            reason=planned.reason,
            zeros=zeros,
            size_bytes=size_bytes,
            packing="plain" if reason else self._packing,
            packing_reason=reason,
        )


def _check_request(
    checkpoint: Checkpoint,
    out: Path,
    quant: str,
    packing: str,
    metadata: Metadata,
    exporter: str,
) -> None:
    packings.check("onnx", quant, packing)
    check_exporter(exporter)
    if out.suffix != ".onnx":
        raise UsageError(
            "wrong-file-name",
            f"{out} is no name for an ONNX graph",
            remedy=f"name it {out.stem}.onnx",
        )

    check_metadata(metadata, (TENSORS_KEY,))

    weights = checkpoint.parameters
    artifact_bytes = round(quants.load(quant).BITS * weights / 8)
    require_space(out.parent, artifact_bytes, "choose another place with --out")

    # The exporter's graph, in float32, lies in the temporary folder until it was compared; where
    # blocks differ in width, beside it the zero-padded twin or that one's graph.
    if checkpoint.shape.is_uniform:
        passing_bytes = 4 * weights
    else:
        passing_bytes = 8 * count_twin_weights(checkpoint)
    scratch = Path(tempfile.gettempdir())
    require_space(scratch, passing_bytes, "move the temporary folder with TMPDIR")
    packings.load_onnx(packing).GraphPacker.check_size(weights)


def _describe_model(checkpoint: Checkpoint, metadata: Metadata) -> dict[str, str]:
    properties = {"general.name": checkpoint.folder.resolve().name}
    if checkpoint.license:
        properties["general.license"] = checkpoint.license
    return properties | {key: str(value) for key, value in metadata.items()}


def _move_in(scratch: Path, out: Path) -> dict[str, str]:
    """Move a finished artifact to its place, the graph last, and return its files' hashes."""
    beside = [data_name(out.name)]
    for packing in packings.names("onnx"):
        beside += packings.load_onnx(packing).GraphPacker.files_beside(out.name)
    for stale in beside:
        (out.parent / stale).unlink(missing_ok=True)

    written = {file.name for file in scratch.iterdir()}
    names = [*sorted(written - {out.name}), out.name]
    for name in names:
        (scratch / name).replace(out.parent / name)

    return {name: file_sha256(out.parent / name) for name in names}


def _write_plain(packed: Path, folder: Path, name: str) -> Path:
    """Write the plain graph with its weights into a folder."""
    model = load_graph(packed)
    properties = read_properties(model)
    tensors = read_tensors(properties, packed)
    if any(packings.load(tensor.packing).BESIDE_PLAIN for tensor in tensors):
        raise UsageError(
            "has-plain-graph",
            f"{packed} is for racdeploy's operator",
            remedy="its plain graph lies beside it, without .accel in its name",
        )

    if all(tensor.packing == "plain" for tensor in tensors):
        raise UsageError(
            "nothing-packed",
            f"nothing in {packed} is packed",
            remedy="racdeploy inspect shows what is in it",
        )

    stored = StoredArrays(model, packed)
    constants = stored.constants(tensors)
    nodes = [node for node in model.graph.node if not node.name.startswith(PACKING_PREFIX)]
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.node.extend(nodes)

    arrays = (item for tensor in tensors for item in stored.take(tensor)[0].items())
    plain = [replace(tensor, packing="plain") for tensor in tensors]
    properties[TENSORS_KEY] = list_tensors(plain)
    write_model(model, chain(constants, arrays), folder, name, lambda: properties)
    return folder / name

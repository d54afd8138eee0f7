"""ONNX: a graph that plain onnxruntime runs, its weights in the asked number format, zeros kept and counted.

An exporter program makes the graph in float32; it counts only after its weights were compared with the checkpoint and
its logits with torch (``onnx_exporters``). The weights in the file are then written from the checkpoint itself, one
tensor at a time. Names are those that transformers.js looks for: ``onnx/model.onnx``, ``model_fp16.onnx``, ….

Inputs and outputs are those of the exporter: ``input_ids``, ``attention_mask``, with optimum ``position_ids``,
``past_key_values.N.key`` and ``.value`` of shape [batch, key-value heads, past, head size]; ``logits`` and
``present.N.key`` and ``.value``. All numbers that go in or come out are float32 or int64.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.accel import accel_name
from racdeploy.errors import UsageError
from racdeploy.export import ExportedTensor, ExportResult, Progress
from racdeploy.export.onnx.accel import refusals, write_accel
from racdeploy.export.onnx.choice import check_exporter, choose
from racdeploy.export.onnx.file import data_name, load_graph, read_array, write_model
from racdeploy.export.onnx.layouts import layouts
from racdeploy.export.onnx.measurement import TENSORS_KEY, StoredArrays, measure, read_tensors
from racdeploy.export.onnx.packing import (
    UNPACK,
    GraphPacker,
    Packer,
    check_size,
    packer_of,
    prove_folding,
)
from racdeploy.export.onnx.weights import PlannedTensor, encode, plan_tensors, wire
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.packing.raconnx import sidecar_name
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

BACKEND = "onnxruntime"
LIBRARY = "onnx"
NEEDS = {
    "onnx": "onnx",
    "onnxruntime": "ort",
    "onnxruntime_genai": "onnx",
    "optimum": "onnx",
    "accelerate": "onnx",
}
OPTIONS = ("exporter",)

_NAMES = {
    "f32": "model.onnx",
    "f16": "model_fp16.onnx",
    "matmulnbits_8": "model_quantized.onnx",
    "matmulnbits_4": "model_q4.onnx",
    "k_quant": "model_q4.onnx",
}
_VOCABULARY = frozenset({"model.embed_tokens.weight", "lm_head.weight"})
_OWN_KEYS = ("racdeploy.", "general.")


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the graph's place in a bundle: transformers.js knows it by its number format."""
    return PurePosixPath("onnx") / _NAMES[quant]


def is_linear(family: Family, name: str) -> bool:
    """Return whether a tensor of the file is a prunable linear."""
    return name.startswith(f"{family.blocks}.") and name.endswith(
        tuple(f".{part}.weight" for part in family.linears)
    )


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    quant: str,
    packing: str = "plain",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    exporter: str = "auto",
    progress: Progress | None = None,
) -> ExportResult:
    """Write a checkpoint as an ONNX graph.

    Args:
        checkpoint: the model folder.
        out: the graph's file, replaced if it exists; above 500 MB its weights go to ``OUT_data`` beside it.
        quant: number format of the linears. Vectors are f32; embedding and output keep at least 8 bits; rows that do
            not divide into blocks are f16.
        packing: ``plain``; ``bitmask_graph``, which every onnxruntime reads, for up to 200M weights;
            ``bitmask_sidecar``, a file ``OUT_packed`` that ``racdeploy.load`` joins; or ``bitmask_op``, the plain graph
            and a second one, ``*.accel.onnx``, for racdeploy's operator.
        metadata: further properties of the graph, ``racdeploy.*`` or ``general.*``.
        exporter: who makes the graph, ``genai`` or ``optimum``; ``auto`` takes the faster graph that passes.
        progress: called after every slab.

    Raises:
        UsageError: an unknown quant, packing or exporter, a wrong suffix, or a metadata key of somebody else.
        ModelError: the checkpoint is damaged, or no exporter can export it.
        MissingExtraError: an exporter is not installed.
        EnvironmentFailure: the disk is full or not writable.
    """
    packings.check("onnx", quant, packing)
    check_exporter(exporter)
    if out.suffix != ".onnx":
        raise UsageError(f"{out} is no name for an ONNX graph", remedy=f"name it {out.stem}.onnx")
    if foreign := [
        key for key in metadata or {} if key == TENSORS_KEY or not key.startswith(_OWN_KEYS)
    ]:
        raise UsageError(
            f"metadata key {foreign[0]!r} is the exporter's; give racdeploy.* or general.* keys"
        )
    _check_space(checkpoint, out, quant)
    check_size(packing, sum(math.prod(entry.shape) for entry in checkpoint.entries.values()))
    chosen = choose(checkpoint, exporter)
    plan = plan_tensors(checkpoint, chosen.graph, quant, _VOCABULARY)
    properties = {"general.name": checkpoint.folder.resolve().name}
    if checkpoint.license:
        properties["general.license"] = checkpoint.license
    properties |= {key: str(value) for key, value in (metadata or {}).items()}
    notes, unpacked_sha256 = [chosen.note], ""
    with (
        disk_errors(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name,
    ):
        scratch, model = Path(name), wire(chosen.graph, plan)
        packer = packer_of(packing, model, scratch, out.name)
        tensors: list[ExportedTensor] = []
        arrays = _encode_all(checkpoint, plan, packer, tensors, progress)
        every = chain(chosen.graph.constants.items(), arrays)
        write_model(
            model,
            every,
            scratch,
            out.name,
            lambda: properties | {TENSORS_KEY: _listed(plan, tensors)},
        )
        if packing == "bitmask_op":
            reasons = refusals(plan, tensors)
            notes.append(
                write_accel(
                    scratch / out.name, reasons, {tensor.name: tensor.zeros for tensor in tensors}
                )
            )
            tensors = [
                replace(tensor, packing="plain" if reason else packing, packing_reason=reason)
                for tensor, reason in zip(tensors, reasons.values(), strict=True)
            ]
        elif packing != "plain":
            unpacked_sha256 = _unpacked_sha256(scratch / out.name)
        if isinstance(packer, GraphPacker):
            prove_folding(scratch / out.name, packer.expected)
            notes.append(
                f"onnxruntime folds all {len(packer.expected)} packed tensors into the plain weights"
            )
        files = _move_in(scratch, out)
    opened = [name for name in files if not name.startswith(accel_name(out.name))]
    size_bytes = sum((out.parent / name).stat().st_size for name in opened)
    return ExportResult(out, tuple(tensors), size_bytes, files, tuple(notes), unpacked_sha256)


def _listed(plan: list[PlannedTensor], tensors: list[ExportedTensor]) -> str:
    rows = zip(plan, tensors, strict=True)
    return json.dumps(
        [replace(planned, packing=tensor.packing).to_json() for planned, tensor in rows]
    )


def _encode_all(
    checkpoint: Checkpoint,
    plan: list[PlannedTensor],
    packer: Packer,
    tensors: list[ExportedTensor],
    progress: Progress | None,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield every array of the file, and describe each tensor in ``tensors`` as it goes by."""
    total, done = sum(math.prod(tensor.shape) for tensor in plan), 0

    def advance(weights: int) -> None:
        nonlocal done
        done += weights
        if progress is not None:
            progress(done, total)

    for tensor in plan:
        arrays, zero_count = encode(checkpoint, tensor, advance)
        zeros = zero_count / math.prod(tensor.shape)
        reason = packer.refusal(tensor, zeros)
        size_bytes = 0
        for key, values in arrays.items() if reason else packer.store(tensor, arrays):
            size_bytes += (
                0 if key.startswith(UNPACK) else values.nbytes
            )  # what all tensors share is no one's
            yield key, values
        real = tensor.quant_asked, tensor.quant_real, tensor.reason
        size_bytes += packer.outside.get(tensor.name, 0)
        packing = "plain" if reason else packer.packing
        tensors.append(
            ExportedTensor(
                tensor.name, tensor.name, tensor.shape, *real, zeros, size_bytes, packing, reason
            )
        )
    packer.finish()


def _unpacked_sha256(packed: Path) -> str:
    """Return the hash of the graph that a packed one stands for, restored from what was written."""
    with tempfile.TemporaryDirectory(prefix="racdeploy-unpacked-", dir=packed.parent) as scratch:
        return file_sha256(_write_plain(packed, Path(scratch), packed.name))


def _move_in(scratch: Path, out: Path) -> dict[str, str]:
    """Move a finished artifact to its place, the graph last, and return the hashes of its files."""
    accel = accel_name(out.name)
    for stale in (data_name(out.name), sidecar_name(out.name), accel, data_name(accel)):
        (out.parent / stale).unlink(missing_ok=True)
    names = sorted(
        (file.name for file in scratch.iterdir()), key=lambda name: (name == out.name, name)
    )
    for name in names:
        (scratch / name).replace(out.parent / name)
    return {name: file_sha256(out.parent / name) for name in names}


def _check_space(checkpoint: Checkpoint, out: Path, quant: str) -> None:
    """Ask for the float32 graph in the temporary folder and the artifact beside it."""
    weights = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    artifact_bytes = round(quants.load(quant).BITS * weights / 8)

    require_space(out.parent, artifact_bytes, "choose another place with --out")
    require_space(Path(tempfile.gettempdir()), 4 * weights, "move the temporary folder with TMPDIR")


def unpack(packed: Path, out: Path | None = None) -> Path:
    """Write the graph that a packed one stands for, as it would have been exported; ``*.plain.onnx`` by default.

    Raises:
        ArtifactError: it is damaged.
        UsageError: nothing in it is packed, ``out`` is the packed graph itself, or another file lies where one is to be
            written.
    """
    plain = out or packed.with_suffix(".plain.onnx")
    if plain.resolve() == packed.resolve() or plain.suffix != ".onnx":
        raise UsageError(
            f"{plain} is no name for the unpacked graph",
            remedy="name another .onnx file with --out",
        )
    if not plain.parent.is_dir():
        raise UsageError(f"{plain.parent} is not a folder", remedy=f"mkdir -p {plain.parent}")
    with (
        disk_errors(plain),
        tempfile.TemporaryDirectory(prefix=f".{plain.name}.", dir=plain.parent) as scratch,
    ):
        _write_plain(packed, Path(scratch), plain.name)
        for written in sorted(Path(scratch).iterdir()):
            refuse_another(plain.with_name(written.name), file_sha256(written))
        _move_in(Path(scratch), plain)
    return plain


def _write_plain(packed: Path, folder: Path, name: str) -> Path:
    """Write the plain graph with its weights into a folder."""
    model = load_graph(packed)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    tensors = read_tensors(properties, packed)
    if any(tensor.packing == "bitmask_op" for tensor in tensors):
        raise UsageError(
            f"{packed} is for racdeploy's operator",
            remedy="its plain graph lies beside it, without .accel in its name",
        )
    if all(tensor.packing == "plain" for tensor in tensors):
        raise UsageError(
            f"nothing in {packed} is packed", remedy="racdeploy inspect shows what is in it"
        )
    stored = StoredArrays(model, packed)
    named = {name for tensor in tensors for name in stored.names(tensor)}
    constants = [
        (key, read_array(value, packed.parent))
        for key, value in stored.left.items()
        if key not in named
    ]
    nodes = [node for node in model.graph.node if not node.name.startswith(UNPACK)]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    arrays = (item for tensor in tensors for item in stored.take(tensor)[0].items())
    properties[TENSORS_KEY] = json.dumps(
        [replace(tensor, packing="plain").to_json() for tensor in tensors]
    )
    write_model(model, chain(constants, arrays), folder, name, lambda: properties)
    return folder / name


def companions(manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Return config.json and genai_config.json, which other programs read; the graph lies in ``folder``."""
    return layouts(manifest, checkpoint, folder)


def usage(entry: ArtifactEntry) -> list[str]:
    """Return how other programs run the graph."""
    name = PurePosixPath(entry.path).name
    unpacking = [
        f"Other programs read the plain graph: `racdeploy unpack {entry.path}`; give what it writes the name {name} "
        f"in a copy of this folder, without {sidecar_name(name)}.",
        "",
    ]
    return [
        *(unpacking if entry.packing == "bitmask_sidecar" else []),
        '- optimum: `ORTModelForCausalLM.from_pretrained(".")`',
        '- onnxruntime-genai: `onnxruntime_genai.Model(".")`',
        "- transformers.js, in Node or in a browser: `AutoModelForCausalLM.from_pretrained(…)`",
    ]

"""ONNX: a graph that plain onnxruntime runs, its weights in the asked number format, zeros kept and counted.

An exporter program makes the graph in float32; it counts only after its weights were compared with the checkpoint and
its logits with torch (``onnx_exporters``). The weights in the file are then written from the checkpoint itself, one
tensor at a time. Names are those that transformers.js looks for: ``onnx/model.onnx``, ``model_fp16.onnx``, ….

Inputs and outputs are those of the exporter: ``input_ids``, ``attention_mask``, with optimum ``position_ids``,
``past_key_values.N.key`` and ``.value`` of shape [batch, key-value heads, past, head size]; ``logits`` and
``present.N.key`` and ``.value``. All numbers that go in or come out are float32 or int64.
"""

from __future__ import annotations

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
from racdeploy.errors import UsageError
from racdeploy.export import ExportedTensor, ExportResult, Progress, check_metadata
from racdeploy.export.onnx.choice import check_exporter, choose
from racdeploy.export.onnx.layouts import layouts, name_graph
from racdeploy.export.onnx.measurement import measure
from racdeploy.export.onnx.weights import PlannedTensor, encode, plan_tensors, wire
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.packing.onnx.file import load_graph, write_model
from racdeploy.packing.onnx.packer import PACKING_PREFIX, Packer, data_name
from racdeploy.packing.onnx.tensors import TENSORS_KEY, StoredArrays, list_tensors, read_tensors
from racdeploy.storage.files import disk_errors, file_sha256, refuse_another, require_space

__all__ = [
    "BACKEND",
    "LIBRARY",
    "NEEDS",
    "OPTIONS",
    "TOKENIZER_PREFIX",
    "WEIGHT_SUFFIXES",
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
COMPARES_F32 = True
NEEDS = {
    "onnx": "onnx",
    "onnxruntime": "ort",
    "onnxruntime_genai": "onnx",
    "optimum": "onnx",
    "accelerate": "onnx",
}
OPTIONS = ("exporter",)
TOKENIZER_PREFIX = ""
WEIGHT_SUFFIXES = ("_data", "_packed")

_VOCABULARY = frozenset({"model.embed_tokens.weight", "lm_head.weight"})


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the graph's place in a bundle: transformers.js knows it by its number format."""
    return PurePosixPath("onnx") / name_graph(quant)


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
    check_metadata(metadata or {}, (TENSORS_KEY,))
    chosen_packing = packings.load_onnx(packing)
    _check_space(checkpoint, out, quant)
    chosen_packing.GraphPacker.check_size(_count_weights(checkpoint))

    chosen = choose(checkpoint, exporter)
    plan = plan_tensors(checkpoint, chosen.graph, quant, _VOCABULARY)
    properties = {"general.name": checkpoint.folder.resolve().name}
    if checkpoint.license:
        properties["general.license"] = checkpoint.license
    properties |= {key: str(value) for key, value in (metadata or {}).items()}

    with (
        disk_errors(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name,
    ):
        scratch = Path(name)
        model = wire(chosen.graph, [tensor.graph for tensor in plan])
        packer = chosen_packing.GraphPacker(model, scratch / out.name)
        stored_packing = "plain" if chosen_packing.BESIDE_PLAIN else packing
        tensors: list[ExportedTensor] = []

        def list_properties() -> dict[str, str]:
            listed = [
                replace(
                    planned.graph, packing=stored_packing if tensor.packing == packing else "plain"
                )
                for planned, tensor in zip(plan, tensors, strict=True)
            ]
            return properties | {TENSORS_KEY: list_tensors(listed)}

        arrays = _encode_all(checkpoint, plan, packing, packer, tensors, progress)
        every = chain(chosen.graph.constants.items(), arrays)
        write_model(model, every, scratch, out.name, list_properties)
        notes = [chosen.note, *packer.complete()]
        unpacked_sha256 = ""
        if stored_packing != "plain":
            unpacked_sha256 = _unpacked_sha256(scratch / out.name)
        files = _move_in(scratch, out)

    unread = packer.files_beside(out.name) if chosen_packing.BESIDE_PLAIN else ()
    read = [out.parent / name for name in files if name not in unread]
    size_bytes = sum(file.stat().st_size for file in read)
    return ExportResult(out, tuple(tensors), size_bytes, files, tuple(notes), unpacked_sha256)


def _count_weights(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) for entry in checkpoint.entries.values())


def _encode_all(
    checkpoint: Checkpoint,
    plan: list[PlannedTensor],
    packing: str,
    packer: Packer,
    tensors: list[ExportedTensor],
    progress: Progress | None,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield every array of the file, and describe each tensor in ``tensors`` as it goes by."""
    total, done = sum(math.prod(tensor.graph.shape) for tensor in plan), 0
    plain = packings.load_onnx("plain").GraphPacker(packer.model, packer.file)

    def advance(weights: int) -> None:
        nonlocal done
        done += weights
        if progress is not None:
            progress(done, total)

    for planned in plan:
        tensor = planned.graph
        arrays, zero_count = encode(checkpoint, tensor, advance)
        zeros = zero_count / math.prod(tensor.shape)
        reason = packer.refusal(tensor, zeros)
        chosen = plain if reason else packer
        yield from chosen.store(tensor, arrays, zeros)
        tensors.append(
            ExportedTensor(
                tensor.name,
                tensor.name,
                tensor.shape,
                planned.quant_asked,
                tensor.quant,
                planned.reason,
                zeros,
                chosen.sizes[tensor.name],
                "plain" if reason else packing,
                reason,
            )
        )
    packer.finish()


def _unpacked_sha256(packed: Path) -> str:
    """Return the hash of the graph that a packed one stands for, restored from what was written."""
    with tempfile.TemporaryDirectory(prefix="racdeploy-unpacked-", dir=packed.parent) as scratch:
        return file_sha256(_write_plain(packed, Path(scratch), packed.name))


def files_beside(name: str) -> list[str]:
    """Return the names of the files that may lie beside a graph of that name."""
    packed = [
        beside
        for packing in packings.names("onnx")
        for beside in packings.load_onnx(packing).GraphPacker.files_beside(name)
    ]
    return [data_name(name), *packed]


def _move_in(scratch: Path, out: Path) -> dict[str, str]:
    """Move a finished artifact to its place, the graph last, and return the hashes of its files."""
    for stale in files_beside(out.name):
        (out.parent / stale).unlink(missing_ok=True)
    names = sorted(
        (file.name for file in scratch.iterdir()), key=lambda name: (name == out.name, name)
    )
    for name in names:
        (scratch / name).replace(out.parent / name)
    return {name: file_sha256(out.parent / name) for name in names}


def _check_space(checkpoint: Checkpoint, out: Path, quant: str) -> None:
    """Ask for the float32 graph in the temporary folder and the artifact beside it."""
    weights = _count_weights(checkpoint)
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
    if any(packings.load(tensor.packing).BESIDE_PLAIN for tensor in tensors):
        raise UsageError(
            f"{packed} is for racdeploy's operator",
            remedy="its plain graph lies beside it, without .accel in its name",
        )
    if all(tensor.packing == "plain" for tensor in tensors):
        raise UsageError(
            f"nothing in {packed} is packed", remedy="racdeploy inspect shows what is in it"
        )

    stored = StoredArrays(model, packed)
    constants = stored.constants(tensors)
    nodes = [node for node in model.graph.node if not node.name.startswith(PACKING_PREFIX)]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)

    arrays = (item for tensor in tensors for item in stored.take(tensor)[0].items())
    properties[TENSORS_KEY] = list_tensors([replace(tensor, packing="plain") for tensor in tensors])
    write_model(model, chain(constants, arrays), folder, name, lambda: properties)
    return folder / name


def companions(manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Return config.json and genai_config.json, which other programs read; the graph lies in ``folder``."""
    return layouts(manifest, checkpoint, folder)


def usage(entry: ArtifactEntry) -> list[str]:
    """Return how other programs run the graph."""
    return [
        *packings.load(entry.packing).usage(entry.path),
        '- optimum: `ORTModelForCausalLM.from_pretrained(".")`',
        '- onnxruntime-genai: `onnxruntime_genai.Model(".")`',
        "- transformers.js, in Node or in a browser: `AutoModelForCausalLM.from_pretrained(…)`",
    ]

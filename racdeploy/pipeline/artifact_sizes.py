"""Predict the size of a recipe's artifact, and the bytes of weights read per token.

A plain GGUF file is planned from a skeleton of the cut model: its config, its tokenizer, and the
shapes of its weights without values. So its size is exact, to the byte.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from racdeploy import packing as packings
from racdeploy import quant
from racdeploy.exporting.gguf.sizes import FileSizes
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.files.writing import canonical_hash
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize_expert
from racdeploy.models.shape import ModelShape
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import list_metadata
from racdeploy.pipeline.structure import expect_shape
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.structures import vocabulary
from racdeploy.pruning.walk.assemble import assemble_zero_filled

_EMBEDDINGS = ("token_embd", "per_layer_token_embd")  # of which a token reads one row


@dataclass(frozen=True)
class ArtifactSize:
    """Size of an artifact.

    Args:
        size_bytes: of the shipped files.
        plain_bytes: of the files that the engine opens: larger if the artifact is packed.
        checkpoint: the model to export, or its skeleton.
        read_bytes: bytes of weights read per token, by number format.
        tensors: of the GGUF file; empty for ONNX.
    """

    size_bytes: int
    plain_bytes: int
    checkpoint: Checkpoint
    read_bytes: Mapping[str, float]
    tensors: tuple[GgufTensorPlan, ...] = ()


class SizePredictor:
    """Predicts sizes of candidates; skeletons are written below ``scratch`` and reused."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._models: dict[str, FileSizes] = {}

    def predict(self, job: Job) -> ArtifactSize:
        """Return the size of a job's artifact.

        It is exact for a plain GGUF file, except where pruning chooses the widths of blocks with
        different formats, or the vocabulary is cut.

        Raises:
            ModelError: the format cannot store the model.
            UsageError: the model cannot be cut like that.
        """
        settings = job.recipe.export
        if settings.format != "gguf":
            return self._estimate_graph(job)

        model = self._find(job)
        is_packed = settings.packing != "plain"
        split_bytes = 0 if is_packed else settings.split_bytes
        metadata = list_metadata(job, model.checkpoint)
        plan = model.plan(job.quant_rules, metadata, split_bytes)
        plain_bytes = model.size_bytes(plan)

        saved_bytes = 0
        if is_packed:
            saved_bytes = round(_expect_saved_bytes(job, plan.tensors))
        read_bytes = count_read_bytes(model.checkpoint.shape, plan.tensors)
        size_bytes = plain_bytes - saved_bytes
        return ArtifactSize(
            size_bytes=size_bytes,
            plain_bytes=plain_bytes,
            checkpoint=model.checkpoint,
            read_bytes=read_bytes,
            tensors=tuple(plan.tensors),
        )

    def _estimate_graph(self, job: Job) -> ArtifactSize:
        # Imported here: users of GGUF need no ONNX packages.
        from racdeploy.pipeline import onnx_sizes

        checkpoint = self._find(job).checkpoint
        tensors = onnx_sizes.plan_graph(checkpoint, job.recipe.export.quant)
        size_bytes = onnx_sizes.estimate_graph_bytes(checkpoint, tensors)
        read_bytes = onnx_sizes.count_read_bytes(checkpoint, tensors)
        return ArtifactSize(
            size_bytes=size_bytes,
            plain_bytes=size_bytes,
            checkpoint=checkpoint,
            read_bytes=read_bytes,
        )

    def _find(self, job: Job) -> FileSizes:
        """Return the file sizes of the checkpoint to export, or of its skeleton, cached."""
        export = job.recipe.export
        structure = job.structure
        old_ids = None
        if job.vocabulary:
            old_ids = job.vocabulary.choose()
        key = canonical_hash(
            {
                "folder": str(job.model.folder),
                "pre_tokenizer": [export.pre_tokenizer, export.accept_token_differences],
                "structure": structure.model_dump() if structure.cut_parts else {},
                "tokens": None if old_ids is None else old_ids.tolist(),
            }
        )
        if key in self._models:
            return self._models[key]

        checkpoint = job.checkpoint
        if structure.cut_parts:
            shape = expect_shape(checkpoint.shape, structure, _make_unequal)
            if shape.sizes != checkpoint.shape.sizes:
                folder = self._scratch / key
                if not folder.is_dir():
                    assemble_zero_filled(checkpoint, folder, shape)
                checkpoint = Checkpoint(folder)
        if old_ids is not None:
            folder = self._scratch / f"{key}-tokens"
            vocabulary.rewrite(checkpoint, old_ids, folder, zero_filled=True)
            checkpoint = Checkpoint(folder)

        approximate = export.accept_token_differences > 0
        model = FileSizes(checkpoint, export.pre_tokenizer, approximate=approximate)
        self._models[key] = model
        return model


def count_read_bytes(shape: ModelShape, tensors: Sequence[GgufTensorPlan]) -> Mapping[str, float]:
    """Return the bytes of weights that are read per token, by number format."""
    read: dict[str, float] = defaultdict(float)
    names = {tensor.name for tensor in tensors}
    is_tied = "output.weight" not in names  # then the embedding is read as the output

    for tensor in tensors:
        is_embedding = tensor.name.startswith(_EMBEDDINGS)
        if is_embedding and not (is_tied and tensor.name == "token_embd.weight"):
            continue
        read[tensor.actual_quant] += tensor.size_bytes * shape.active_share(tensor.source)
    return read


def _make_unequal(counts: list[int], layouts: Sequence[UnitLayout]) -> list[int]:
    """Make equal counts unequal at the same sum: the last block keeps more, the first fewer.

    Pruning gives blocks different widths, so the file has to list them, which takes bytes. Counts
    are returned unchanged if there is no such pair.
    """
    fewer = [count for count in layouts[0].counts if count < counts[0]]
    more = [count for count in layouts[-1].counts if count > counts[-1]]
    if len(counts) < 2 or not fewer or not more:
        return counts

    unequal = [max(fewer), *counts[1:-1], min(more)]
    return unequal if sum(unequal) == sum(counts) else counts


def _expect_saved_bytes(job: Job, tensors: Sequence[GgufTensorPlan]) -> float:
    """Return the bytes saved by packing: the codes of zeros, minus a mask of one bit per weight."""
    recipe = job.recipe
    sparsity = recipe.prune.sparsity
    packing = packings.load(recipe.export.packing)
    pruned = {generalize_expert(weight) for weight in job.weights_to_prune}

    saved = 0.0
    for tensor in tensors:
        name = tensor.actual_quant
        is_pruned = pruned.issuperset(map(generalize_expert, tensor.parts))

        if is_pruned and not packing.reason_for_plain(name, sparsity):
            code_bits = math.floor(quant.load(name).bits)
            saved_bits = max(0.0, sparsity * code_bits - 1)
            saved += saved_bits * math.prod(tensor.shape) / 8

    return saved

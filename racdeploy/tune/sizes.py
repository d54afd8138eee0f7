"""How many bytes the artifact of a recipe will have, and how many a token reads of it.

A plain GGUF file is planned from a skeleton of the cut model: its config, its tokenizer, and the
shapes of its weights without the values. So its size is exact, to the byte.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from racdeploy import packing as packings
from racdeploy import quant
from racdeploy.export.gguf.sizes import FileSizes
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.files.writing import canonical_hash
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expert_of, generalize
from racdeploy.models.shape import ModelShape
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import describe_model
from racdeploy.pipeline.structure import expect_shape
from racdeploy.prune.structure.layout import Layout
from racdeploy.prune.structures import vocabulary
from racdeploy.prune.walk.assemble import CutShape, sketch

_EMBEDDINGS = ("token_embd", "per_layer_token_embd")  # of which a token reads one row


@dataclass(frozen=True)
class Size:
    """Of one artifact.

    Args:
        size_bytes: of the files that ship.
        plain_bytes: of those that the engine opens, the same unless the artifact is packed.
        checkpoint: what will be exported, or its skeleton.
        read_bytes: of the weights that are read for each token, by number format.
        tensors: of the GGUF file; empty for another format.
    """

    size_bytes: int
    plain_bytes: int
    checkpoint: Checkpoint
    read_bytes: Mapping[str, float]
    tensors: tuple[PlannedTensor, ...] = ()


class Sizes:
    """Sizes of the candidates of a search; skeletons are written below ``scratch``, each once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._models: dict[str, FileSizes] = {}

    def predict(self, job: Job) -> Size:
        """Return the size of the artifact that a job's recipe ends with.

        It is exact for a plain GGUF file, unless blocks get different formats and pruning is to
        choose how wide they are, or the vocabulary is cut.

        Raises:
            ModelError: the format has no place for such a model.
            UsageError: the model does not allow such a cut.
        """
        settings = job.recipe.export
        if settings.format != "gguf":
            return self._estimate_graph(job)

        model = self._find(job)
        is_packed = settings.packing != "plain"
        split_bytes = 0 if is_packed else settings.split_bytes
        metadata = describe_model(job, model.checkpoint)
        plan = model.plan(job.quant_rules, metadata, split_bytes)
        plain_bytes = model.size_bytes(plan)

        saved_bytes = 0
        if is_packed:
            saved_bytes = round(_expect_saved_bytes(job, plan.tensors))
        read_bytes = count_read_bytes(model.checkpoint.shape, plan.tensors)
        size_bytes = plain_bytes - saved_bytes
        return Size(
            size_bytes=size_bytes,
            plain_bytes=plain_bytes,
            checkpoint=model.checkpoint,
            read_bytes=read_bytes,
            tensors=tuple(plan.tensors),
        )

    def _estimate_graph(self, job: Job) -> Size:
        # Whoever makes no ONNX files has no package for them.
        from racdeploy.tune import graphs

        checkpoint = self._find(job).checkpoint
        tensors = graphs.plan_graph(checkpoint, job.recipe.export.quant)
        size_bytes = graphs.estimate_bytes(checkpoint, tensors)
        read_bytes = graphs.count_read_bytes(checkpoint, tensors)
        return Size(
            size_bytes=size_bytes,
            plain_bytes=size_bytes,
            checkpoint=checkpoint,
            read_bytes=read_bytes,
        )

    def _find(self, job: Job) -> FileSizes:
        """Return the files of the checkpoint that is exported, or of a skeleton of it."""
        export = job.recipe.export
        structure = job.structure
        old_ids = None
        if job.vocabulary:
            old_ids = job.vocabulary.choose()
        key = canonical_hash(
            {
                "folder": str(job.model.folder),
                "pre_tokenizer": [export.pre_tokenizer, export.accept_token_differences],
                "structure": structure.model_dump() if structure.parts else {},
                "tokens": None if old_ids is None else old_ids.tolist(),
            }
        )
        if key in self._models:
            return self._models[key]

        checkpoint = job.checkpoint
        if structure.parts:
            shape = expect_shape(checkpoint.shape, structure, _push)
            checkpoint = self._sketch(checkpoint, key, shape)
        if old_ids is not None:
            folder = self._scratch / f"{key}-tokens"
            vocabulary.rewrite(checkpoint, old_ids, folder, hollow=True)
            checkpoint = Checkpoint(folder)

        approximate = export.accept_token_differences > 0
        model = FileSizes(checkpoint, export.pre_tokenizer, approximate=approximate)
        self._models[key] = model
        return model

    def _sketch(self, checkpoint: Checkpoint, key: str, shape: CutShape) -> Checkpoint:
        if shape.sizes == checkpoint.shape.sizes:
            return checkpoint
        folder = self._scratch / key
        return Checkpoint(folder if folder.is_dir() else sketch(checkpoint, folder, shape))


def count_read_bytes(shape: ModelShape, tensors: Sequence[PlannedTensor]) -> Mapping[str, float]:
    """Return the bytes of weights that one token reads, by number format."""
    read: dict[str, float] = defaultdict(float)
    names = {tensor.name for tensor in tensors}
    is_head = "output.weight" not in names  # the embedding is

    for tensor in tensors:
        is_embedding = tensor.name.startswith(_EMBEDDINGS)
        if is_embedding and not (is_head and tensor.name == "token_embd.weight"):
            continue
        read[tensor.quant_real] += tensor.size_bytes * share_of_experts(shape, tensor.parts)
    return read


def share_of_experts(shape: ModelShape, names: Sequence[str]) -> float:
    """Return which share of the experts of a tensor a token goes through; 1 where it has none."""
    is_routed = any(expert_of(name) is not None for name in names)
    used = shape.config.get("num_experts_per_tok")
    if not is_routed or not shape.num_experts or not isinstance(used, int):
        return 1.0
    return min(1.0, used / shape.num_experts)


def _push(counts: list[int], layouts: Sequence[Layout]) -> list[int]:
    """Return counts of the same sum that differ: the last block keeps more, the first less.

    Pruning gives blocks different widths, which their file has to list.
    """
    fewer = [count for count in layouts[0].counts if count < counts[0]]
    further = [count for count in layouts[-1].counts if count > counts[-1]]
    if len(counts) < 2 or not fewer or not further:
        return counts

    pushed = [max(fewer), *counts[1:-1], min(further)]
    return pushed if sum(pushed) == sum(counts) else counts


def _expect_saved_bytes(job: Job, tensors: Sequence[PlannedTensor]) -> float:
    """Return the bytes that packing leaves out: the codes of zeros, but for a mask of one bit."""
    recipe = job.recipe
    sparsity = recipe.prune.sparsity
    packing = packings.load(recipe.export.packing)
    pruned = {generalize(weight) for weight in job.weights_to_prune}

    saved = 0.0
    for tensor in tensors:
        name = tensor.quant_real
        is_pruned = pruned.issuperset(map(generalize, tensor.parts))

        if is_pruned and not packing.fits(name, sparsity):
            code_bits = math.floor(quant.load(name).BITS)
            saved_bits = max(0.0, sparsity * code_bits - 1)
            saved += saved_bits * math.prod(tensor.shape) / 8

    return saved

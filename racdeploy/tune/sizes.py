"""How many bytes the artifact of a recipe will have, and how many a token reads of it.

A plain GGUF file is planned from a skeleton of the cut model: its config, its tokenizer, and the
shapes of its weights without the values. So its size is exact, to the byte.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy.export.gguf.body import ALIGNMENT
from racdeploy.export.gguf.sizes import FileSizes
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expert_of, generalize
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import describe_model
from racdeploy.pipeline.structure import expect_shape
from racdeploy.prune.assemble import Shape, sketch
from racdeploy.prune.layout import Layout
from racdeploy.prune.shares import fill_shares
from racdeploy.prune.structures import vocabulary
from racdeploy.recipe import Zeros, count_zeros
from racdeploy.storage.files import canonical_hash
from racdeploy.traces.trace import Trace
from racdeploy.tune.packed import expect_saved_bytes

_IN_BLOCK = re.compile(r"^blk\.\d+\.(.+)$")
_FREE_WIDTHS = "blocks of different widths get different number formats, and widths are not known"
_CHOSEN = {"ffn", "heads"}  # parts of which pruning chooses how many each block keeps
_FREE_BLOCKS = "blocks are of several kinds, and which of them stay is not known"
_FREE_TOKENS = "which tokens stay is known once there are traces"
_FREE_GRAPH = "another program writes the graph of an ONNX file"
_FREE_PACKING = "how well {} packs is known once there are zeros"
_EMBEDDINGS = ("token_embd", "per_layer_token_embd")  # of which a token reads one row


@dataclass(frozen=True)
class Size:
    """Of one artifact.

    Args:
        size_bytes: of the files that ship.
        plain_bytes: of those that the engine opens, the same unless the artifact is packed.
        why_inexact: why ``size_bytes`` is only expected; empty where it is exact.
        checkpoint: what will be exported, or its skeleton.
        read_bytes: of the weights that are read for each token, by number format.
        tensors: of the GGUF file; empty for another format.
    """

    size_bytes: int
    plain_bytes: int
    why_inexact: str
    checkpoint: Checkpoint
    read_bytes: Mapping[str, float]
    tensors: tuple[PlannedTensor, ...] = ()

    @property
    def is_exact(self) -> bool:
        return not self.why_inexact


@dataclass
class _Model:
    """A checkpoint that may be a skeleton, and what all files made of it share."""

    checkpoint: Checkpoint
    pre_tokenizer: str | None
    approximate: bool
    why_inexact: str = ""

    @cached_property
    def files(self) -> FileSizes:
        return FileSizes(self.checkpoint, self.pre_tokenizer, approximate=self.approximate)


class Sizes:
    """Sizes of the candidates of a search; skeletons are written below ``scratch``, each once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._models: dict[str, _Model] = {}

    def predict(self, job: Job, traces: Sequence[Trace] = (), *, pruned: bool = True) -> Size:
        """Return the size of the artifact that a job's recipe ends with.

        Args:
            traces: the dense model's, by which a cut of the vocabulary becomes exact.
            pruned: whether it is the pruned artifact; the dense one is whole and plain.

        Raises:
            ModelError: the format has no place for such a model.
            UsageError: the model does not allow such a cut.
        """
        if job.recipe.export.format != "gguf":
            return self._estimate_graph(job, traces, pruned)

        model = self._find(job, traces, pruned)
        size = self._plan(job, model, pruned)

        why = _find_unknown(job, size.tensors) if pruned else ""
        return replace(size, why_inexact=size.why_inexact or why)

    def _plan(self, job: Job, model: _Model, pruned: bool) -> Size:
        settings, checkpoint = job.recipe.export, model.checkpoint
        metadata = describe_model(job, checkpoint) if pruned else {}
        is_packed = pruned and settings.packing != "plain"
        split_bytes = 0 if is_packed else settings.split_bytes

        plan = model.files.plan(job.quant_rules, metadata, split_bytes)
        plain_bytes = model.files.size_bytes(plan)
        zeros = _expect_tensor_zeros(job, plan.tensors) if pruned else {}
        plain = Size(
            size_bytes=plain_bytes,
            plain_bytes=plain_bytes,
            why_inexact=model.why_inexact,
            checkpoint=checkpoint,
            read_bytes=count_read_bytes(checkpoint, plan.tensors),
            tensors=tuple(plan.tensors),
        )
        if not is_packed:
            return plain

        saved = 0.0
        for tensor in plan.tensors:
            if tensor.name in zeros:
                saved += expect_saved_bytes(settings.packing, tensor, zeros[tensor.name])

        why = _FREE_PACKING.format(settings.packing)
        return replace(plain, size_bytes=plain_bytes - round(saved), why_inexact=why)

    def _estimate_graph(self, job: Job, traces: Sequence[Trace], pruned: bool) -> Size:
        # Whoever makes no ONNX files has no package for them.
        from racdeploy.tune import graphs

        checkpoint = self._find(job, traces, pruned).checkpoint
        tensors = graphs.plan_graph(checkpoint, job.recipe.export.quant)
        plain_bytes = graphs.estimate_bytes(checkpoint, tensors)
        saved = 0.0
        if pruned and job.recipe.export.packing != "plain":
            zeros = _expect_zeros(job, job.checkpoint)
            saved = graphs.expect_saved_bytes(job.recipe.export.packing, tensors, zeros)

        read_bytes = graphs.count_read_bytes(checkpoint, tensors)
        return Size(plain_bytes - round(saved), plain_bytes, _FREE_GRAPH, checkpoint, read_bytes)

    def _find(self, job: Job, traces: Sequence[Trace], pruned: bool) -> _Model:
        """Return the checkpoint that is exported, or a skeleton of it."""
        export, structure = job.recipe.export, job.structure
        is_cut = pruned and structure.parts
        old_ids = job.vocabulary.choose(traces) if is_cut and job.vocabulary else None

        key = canonical_hash(
            {
                "folder": str(job.model.folder),
                "pre_tokenizer": [export.pre_tokenizer, export.accept_token_differences],
                "structure": structure.model_dump() if is_cut else {},
                "tokens": None if old_ids is None else old_ids.tolist(),
            }
        )
        if key in self._models:
            return self._models[key]

        checkpoint, why = job.checkpoint, ""
        if is_cut:
            shape = expect_shape(checkpoint, structure, _push)
            checkpoint = self._sketch(checkpoint, key, shape)
        if old_ids is not None:
            folder = self._scratch / f"{key}-tokens"
            vocabulary.rewrite(checkpoint, old_ids, folder, hollow=True)
            checkpoint = Checkpoint(folder)
            why = "" if traces else _FREE_TOKENS

        approximate = export.accept_token_differences > 0
        model = _Model(checkpoint, export.pre_tokenizer, approximate, why)
        self._models[key] = model
        return model

    def _sketch(self, checkpoint: Checkpoint, key: str, shape: Shape) -> Checkpoint:
        if shape == Shape.of(checkpoint):
            return checkpoint
        folder = self._scratch / key
        return Checkpoint(folder if folder.is_dir() else sketch(checkpoint, folder, shape))


def count_read_bytes(
    checkpoint: Checkpoint, tensors: Sequence[PlannedTensor]
) -> Mapping[str, float]:
    """Return the bytes of weights that one token reads, by number format."""
    read: dict[str, float] = defaultdict(float)
    names = {tensor.name for tensor in tensors}
    is_head = "output.weight" not in names  # the embedding is

    for tensor in tensors:
        is_embedding = tensor.name.startswith(_EMBEDDINGS)
        if is_embedding and not (is_head and tensor.name == "token_embd.weight"):
            continue
        read[tensor.quant_real] += tensor.size_bytes * share_of_experts(checkpoint, tensor.parts)
    return read


def share_of_experts(checkpoint: Checkpoint, names: Sequence[str]) -> float:
    """Return which share of the experts of a tensor a token goes through; 1 where it has none."""
    is_routed = any(expert_of(name) is not None for name in names)
    used = checkpoint.config.get("num_experts_per_tok")
    if not is_routed or not checkpoint.experts or not isinstance(used, int):
        return 1.0
    return min(1.0, used / checkpoint.experts)


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


def _find_unknown(job: Job, tensors: Sequence[PlannedTensor]) -> str:
    """Return what pruning has yet to choose and the size depends on, or an empty string."""
    structure = job.structure
    checkpoint = job.checkpoint

    kinds = {checkpoint.kinds(block) for block in range(checkpoint.block_count)}
    if "blocks" in structure.parts and len(kinds) > 1:
        return _FREE_BLOCKS

    is_free = not structure.uniform and not _CHOSEN.isdisjoint(structure.parts)
    return _FREE_WIDTHS if is_free and _depends_on_widths(tensors) else ""


def _depends_on_widths(tensors: Sequence[PlannedTensor]) -> bool:
    """Return whether it matters to the size which blocks are wide, or only the sum of all."""
    formats: dict[str, set[str]] = {}

    for tensor in tensors:
        match = _IN_BLOCK.match(tensor.name)
        if match is None:
            continue
        if tensor.size_bytes % ALIGNMENT:
            return True

        own = formats.setdefault(match[1], set())
        own.add(tensor.quant_real)

    return any(len(own) > 1 for own in formats.values())


def _expect_tensor_zeros(job: Job, tensors: Sequence[PlannedTensor]) -> dict[str, Zeros]:
    """Return the zeros of each tensor of a file that has some; where its parts differ, the mean."""
    zeros = _expect_zeros(job, job.checkpoint)
    found: dict[str, Zeros] = {}

    for tensor in tensors:
        own = [zeros.get(part, zeros.get(generalize(part), 0.0)) for part in tensor.parts]
        shares = [count_zeros(each) for each in own]
        mean = sum(shares) / len(shares)
        if mean:
            found[tensor.name] = own[0] if len({*own}) == 1 else mean

    return found


def _expect_zeros(job: Job, checkpoint: Checkpoint) -> dict[str, Zeros]:
    """Return the zeros of each weight that is pruned, by its name in any block or in one.

    Pruning may leave out blocks, and what follows takes their numbers: only where the recipe names
    linears do numbers count.
    """
    settings = job.recipe.prune
    pruned = job.weights_to_prune
    if not settings.shares:
        alike = settings.pattern if settings.kept_of else settings.sparsity
        return {generalize(weight): alike for weight in pruned}

    sizes = {}
    for weight in pruned:
        sizes[weight.removesuffix(".weight")] = math.prod(checkpoint.entries[weight].shape)
    shares = fill_shares(settings.shares, sizes, settings.sparsity)

    zeros: dict[str, Zeros] = {}
    for linear, share in shares.items():
        kept_of = settings.kept_of_linear(linear)
        zeros[f"{linear}.weight"] = f"{kept_of[0]}:{kept_of[1]}" if kept_of else share
    return zeros

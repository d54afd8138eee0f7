"""A pruned model as it ships: what is in its files, and the answers of its further artifacts.

A build knows such a model from its stages, a finished bundle from its manifest and report. From
here on both are verified in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from racdeploy import exporting
from racdeploy.engines.engine import Ids
from racdeploy.errors import ArtifactError
from racdeploy.exporting import MeasuredTensor
from racdeploy.files.reading import Json
from racdeploy.models.families import Family
from racdeploy.results.pruning import LinearRow, TensorRow
from racdeploy.verification.evidence import ArmResult, Evidence, Findings, OtherArtifact
from racdeploy.verification.examiner import Examiner
from racdeploy.verification.interim import needs_no_more
from racdeploy.verification.measurements import (
    probe_shipped_prompts,
    read_stop_ids,
)
from racdeploy.verification.subject import Subject

_CONSTANT_TYPES = ("int32", "int64", "bool")


@dataclass(frozen=True)
class FileContent:
    """Measured content of an artifact.

    Args:
        tensors: in file order.
        prunable: names of the tensors that pruning may change.
        sparsity: zeros over the prunable tensors, 0 to 1.
    """

    metadata: Json
    tensors: tuple[TensorRow, ...]
    prunable: frozenset[str]
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class ShippedArtifact:
    """An artifact of a bundle.

    Args:
        subject: its file with the tokenizer and the thinking control that ship.
        exported: its tensors as they were exported, by name; those that are missing are constants
            of the exporter.
    """

    subject: Subject
    family: Family
    format: str
    packing: str
    exported: Mapping[str, TensorRow] = field(default_factory=dict)

    @cached_property
    def content(self) -> FileContent:
        """Tensors, zeros and metadata, read back from the file.

        Raises:
            ArtifactError: a tensor has a type that cannot be read.
        """
        path = self.subject.path
        form = exporting.load(self.format)
        metadata, tensors = form.measure(path)
        prunable = form.list_linears(self.family, metadata, tensors)

        rows = []
        zeros = weights = 0.0
        for tensor in tensors:
            if tensor.zeros is None:
                if self._is_constant(tensor):
                    continue
                raise _refuse_unreadable(path, tensor)
            rows.append(self._make_row(tensor, tensor.zeros))
            if tensor.name in prunable:
                count = math.prod(tensor.shape)
                zeros += tensor.zeros * count
                weights += count

        sparsity = zeros / weights if weights else 0.0
        return FileContent(metadata, tuple(rows), prunable, sparsity)

    def measured(self) -> Subject:
        """Return the subject with the sparsity of its file."""
        return replace(self.subject, sparsity=self.content.sparsity)

    def _is_constant(self, tensor: MeasuredTensor) -> bool:
        """Return whether an exporter computed these integers: an axis or a shape, no weights."""
        return tensor.type in _CONSTANT_TYPES and tensor.name not in self.exported

    def _make_row(self, tensor: MeasuredTensor, zeros: float) -> TensorRow:
        exported = self.exported.get(tensor.name)
        return TensorRow(
            name=tensor.name,
            requested_quant=exported.requested_quant if exported else tensor.type,
            actual_quant=tensor.type,
            zeros=zeros,
            size_bytes=tensor.size_bytes,
            bits=8 * tensor.size_bytes / math.prod(tensor.shape),
            reason=exported.reason if exported else "",
            packing=tensor.packing,
            packing_reason=exported.packing_reason if exported else "",
        )


@dataclass(frozen=True, kw_only=True)
class ShippedModel:
    """A pruned model in its artifacts, and what was asked of its pruning and export.

    Args:
        artifacts: one for each engine; the first is compared with the dense model.
        prompt_ids: by question, the ids that every template must give.
        eos_ids: end-of-sequence ids of the checkpoint.
        requested_sparsity: share of zeros over the prunable weights that the last kept pruning
            step asked for.
        linears: pruning of each linear.
        token_differences: share of the strings that may be tokenized differently, 0 to 1.
    """

    artifacts: Sequence[ShippedArtifact]
    prompt_ids: Mapping[str, Sequence[int]]
    eos_ids: Ids
    requested_sparsity: float
    linears: Sequence[LinearRow]
    token_differences: float

    @property
    def main(self) -> ShippedArtifact:
        """The artifact that is compared with the dense model."""
        return self.artifacts[0]

    def inspect(self) -> Findings:
        """Return what the file of the first artifact shows without an engine."""
        content = self.main.content
        # The sparsity check must not expect zeros in linears that were to stay dense.
        stay_dense = [row.name for row in self.linears if row.requested_sparsity == 0]
        encoder = self.main.subject.encoder
        prefix = exporting.load(self.main.format).TOKENIZER_PREFIX
        return Findings(
            requested_sparsity=self.requested_sparsity,
            tensors=content.tensors,
            prunable=content.prunable,
            dense_linears=frozenset(stay_dense),
            probes=None,  # unless the engine has a tokenizer
            token_differences=self.token_differences,
            prompts=probe_shipped_prompts(encoder, content.metadata, self.prompt_ids),
            stop_ids=read_stop_ids(prefix, content.metadata, self.eos_ids),
            packing=self.main.packing,
        )

    def answer_others(self, examiner: Examiner) -> list[tuple[OtherArtifact, int]]:
        """Answer with the artifacts for other engines; return how many answers were reused."""
        answered = []
        for artifact in self.artifacts[1:]:
            subject = artifact.measured()
            arm, answers = examiner.answer(subject, f"pruned, {subject.backend}")
            arm = replace(arm, stats=answers.reused_stats or answers.stats)
            other = OtherArtifact(arm, subject.backend, subject.path, subject.files)
            answered.append((other, answers.reused))
        return answered

    def weigh_interim(self, examiner: Examiner, dense: ArmResult) -> Evidence:
        """Return the evidence of an interim analysis.

        Other engines are asked only where the first artifact needs no more prompts: else they
        would answer what may not be used.

        Args:
            examiner: of the prompts of the analysis.
            dense: answers to them.
        """
        subject = self.main.subject
        pruned, _ = examiner.answer(subject, "pruned")
        evidence = examiner.weigh(subject, dense, pruned, Findings())
        if len(self.artifacts) == 1 or not needs_no_more(evidence):
            return evidence

        others = []
        for other, _ in self.answer_others(examiner):
            others.append(other)
        return replace(evidence, other_artifacts=tuple(others))


def _refuse_unreadable(path: Path, tensor: MeasuredTensor) -> ArtifactError:
    return ArtifactError(
        "unreadable-tensor-type",
        f"{path}: racdeploy cannot read type {tensor.type} of {tensor.name}",
        remedy="build the bundle again with a quant of: racdeploy plugins",
    )

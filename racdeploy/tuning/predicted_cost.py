"""Predict a candidate's file size, memory, and seconds per token on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from racdeploy.files.writing import canonical_hash
from racdeploy.targets import Device
from racdeploy.tuning.artifact_sizes import ArtifactSize, SizePredictor
from racdeploy.tuning.candidates import CandidateSpec
from racdeploy.tuning.entries import PredictedCost
from racdeploy.tuning.speed import predict_memory, predict_token_s


@dataclass
class CostPredictor:
    """Cost model of candidates on a device; ``scratch`` is a folder for models without weights."""

    scratch: Path
    device: Device
    _known: dict[str, ArtifactSize] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)  # hash of a file → first candidate

    def __post_init__(self) -> None:
        self._sizes = SizePredictor(self.scratch)

    def size(self, spec: CandidateSpec) -> ArtifactSize:
        """Return the size of a candidate's file and its tensors, cached by name."""
        if spec.name not in self._known:
            self._known[spec.name] = self._sizes.predict(spec.job)
        return self._known[spec.name]

    def predict(self, spec: CandidateSpec) -> PredictedCost:
        """Return the cost of a candidate; memory includes a key-value cache of full length."""
        size = self.size(spec)
        memory_bytes = predict_memory(
            self.device,
            size.checkpoint.shape,
            size.plain_bytes,
            size.read_bytes,
            spec.recipe.verify.context_tokens,
            spec.job.backend,
        )
        token_s = predict_token_s(self.device, size.read_bytes)
        return PredictedCost(size.size_bytes, memory_bytes, token_s)

    def find_duplicate(self, spec: CandidateSpec) -> str:
        """Return the name of an earlier candidate with the same file, or an empty string.

        Two presets may give all tensors of a model the same formats.
        """
        recipe = spec.recipe
        prune = spec.recipe.prune
        formats = [tensor.actual_quant for tensor in self.size(spec).tensors]
        key = canonical_hash(
            [
                formats or recipe.export.quant,
                recipe.structure.keep,
                [prune.sparsity, prune.pattern],
                [recipe.recover.tokens, recipe.export.packing, recipe.export.rounding],
            ]
        )
        first = self._first.setdefault(key, spec.name)
        return "" if first == spec.name else first

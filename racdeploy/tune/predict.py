"""What a candidate takes, before it is made: bytes, memory, and seconds a token on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from racdeploy.files.writing import canonical_hash
from racdeploy.targets import Device
from racdeploy.tune.candidates import Choice
from racdeploy.tune.entries import PredictedCost
from racdeploy.tune.sizes import Size, Sizes
from racdeploy.tune.speed import predict_memory, predict_token_s


@dataclass
class Predictor:
    """Predicts for candidates on one device; ``scratch`` is a folder for skeletons of models."""

    scratch: Path
    device: Device
    _known: dict[str, Size] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)  # candidate by the hash of its file

    def __post_init__(self) -> None:
        self._sizes = Sizes(self.scratch)

    def size(self, choice: Choice) -> Size:
        """Return the size of a candidate's file, and its tensors."""
        if choice.name not in self._known:
            self._known[choice.name] = self._sizes.predict(choice.job)
        return self._known[choice.name]

    def predict(self, choice: Choice) -> PredictedCost:
        """Return what a candidate takes; memory has to do for the longest answer."""
        size = self.size(choice)
        memory_bytes = predict_memory(
            self.device,
            size.checkpoint.shape,
            size.plain_bytes,
            size.read_bytes,
            choice.recipe.verify.context_tokens,
            choice.job.backend,
        )
        token_s = predict_token_s(self.device, size.read_bytes)
        return PredictedCost(size.size_bytes, memory_bytes, token_s)

    def find_twin(self, choice: Choice) -> str:
        """Return the name of an earlier candidate with the same file, or an empty string."""
        recipe = choice.recipe
        prune = choice.recipe.prune
        formats = [tensor.quant_real for tensor in self.size(choice).tensors]
        same = canonical_hash(
            [
                formats or recipe.export.quant,
                recipe.structure.keep,
                [prune.sparsity, prune.pattern, prune.joint],
                [recipe.recover.tokens, recipe.export.packing],
            ]
        )
        first = self._first.setdefault(same, choice.name)
        return "" if first == choice.name else first

"""State of a candidate in a search, its check against the limits, and orders of candidates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from racdeploy.engines.decoding_speed import DecodeSample
from racdeploy.exporting import ExportResult
from racdeploy.files.toml import merge
from racdeploy.pipeline.artifact_sizes import ArtifactSize
from racdeploy.pruning import PrunedModel
from racdeploy.report.pareto import find_non_dominated
from racdeploy.results.tuning import (
    Candidate,
    Constraints,
    CostEstimate,
    Objective,
    Reached,
    ShareEstimate,
)
from racdeploy.targets import Device
from racdeploy.tuning.candidates import BASE_SETTINGS, CandidateSpec
from racdeploy.tuning.race import Contestant, Scores
from racdeploy.tuning.speed import predict_memory
from racdeploy.verification.stats.costs import cost_per_success
from racdeploy.verification.stats.paired import wilson_interval

_MISSING_KL = 99.0  # nats, of a candidate without a measured KL


@dataclass
class Entry:
    """State of a candidate; ``reason`` is that of its rejection, empty while it may win.

    ``size``, ``memory_bytes`` of the process and ``token_s`` on the device are predicted.
    """

    spec: CandidateSpec
    size: ArtifactSize
    memory_bytes: int = 0
    token_s: float = 0.0
    reached: Reached = "counted"
    reason: str = ""
    meets_limits: bool = True
    kl_nats: float | None = None
    model: PrunedModel | None = field(default=None, repr=False)
    exported: ExportResult | None = field(default=None, repr=False)
    scores: Scores | None = field(default=None, repr=False)
    decode_sample: DecodeSample | None = field(
        default=None, repr=False
    )  # one sequence on this machine

    def predict(self, device: Device) -> None:
        """Predict memory, with a key-value cache of full length, and seconds per token."""
        self.token_s = device.predict_token_s(self.size.read_bytes)
        self.memory_bytes = predict_memory(
            device,
            self.size.checkpoint.shape,
            file_bytes=self.size.plain_bytes,
            read_bytes=self.size.read_bytes,
            context_tokens=self.spec.job.verification.context_tokens,
            engine=self.spec.job.backend,
        )

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_active(self) -> bool:
        return not self.reason

    @property
    def file_key(self) -> tuple[str, ...]:
        """Equal for candidates with the same file: two presets may store all tensors alike."""
        export = self.spec.recipe.export
        formats = [tensor.actual_quant for tensor in self.size.tensors]
        return self.spec.kind, str(export.rounding), *(formats or [export.quant])

    @property
    def size_bytes(self) -> int:
        """Size of the artifact, measured if it was exported."""
        return self.exported.size_bytes if self.exported else self.size.size_bytes

    @property
    def distance(self) -> float:
        """KL from the dense model in nats; a large number if unknown."""
        return _MISSING_KL if self.kl_nats is None else self.kl_nats

    @property
    def accuracy(self) -> float:
        """Share of correct answers; requires ``scores``."""
        assert self.scores is not None
        return float(self.scores.right_N.mean())

    def reject(self, reason: str) -> None:
        """Reject it, unless it was rejected before: the first reason stays."""
        self.reason = self.reason or reason

    def check(self, limits: Constraints) -> None:
        """Set ``meets_limits``, and reject it if it breaks a limit."""
        broken = _list_broken(self, limits)
        self.meets_limits = not broken
        self.reject(", ".join(each.message for each in broken))

    def as_contestant(self) -> Contestant:
        """Return its data for the race."""
        return Contestant(
            self.name,
            size_bytes=self.size_bytes,
            seconds_per_token=self.token_s,
            kl_nats=self.distance,
            dense=self.spec.dense,
        )

    def as_row(self) -> Candidate:
        """Return its row of the search's result."""
        alone = self.decode_sample
        return Candidate(
            name=self.name,
            dense=self.spec.dense,
            settings=dict(merge(BASE_SETTINGS, self.spec.settings)),
            reached=self.reached,
            reason=self.reason,
            size_bytes=self.size_bytes,
            size_measured=self.exported is not None,
            memory_bytes=self.memory_bytes,
            tokens_per_s=self.tokens_per_s,
            measured_tokens_per_s=1 / alone.token_s if alone else None,
            kl_nats=self.kl_nats,
            meets_limits=self.meets_limits,
            **_count(self.scores, self.token_s),
        )


def _count(scores: Scores | None, token_s: float) -> dict[str, object]:
    """Return the fields of a candidate's row that come from its answers."""
    if scores is None:
        return {}

    prompts = len(scores)
    correct = int(scores.right_N.sum())
    wilson = wilson_interval(correct, prompts)
    accuracy = ShareEstimate(value=correct / prompts, lower=wilson.lower, upper=wilson.upper)
    cost = cost_per_success(scores.tokens_N * token_s, scores.right_N)
    return {
        "prompts": prompts,
        "correct": correct,
        "accuracy": accuracy,
        "thinking_tokens_mean": float(scores.thinking_N.mean()),
        "seconds_per_correct": CostEstimate(value=cost.ratio, lower=cost.lower, upper=cost.upper),
    }


class _BrokenLimit(NamedTuple):
    """A broken limit: the excess as a factor, a message, and the option that would allow it."""

    factor: float
    message: str
    option: str


def _list_broken(entry: Entry, limits: Constraints) -> list[_BrokenLimit]:
    size = entry.size_bytes
    memory = entry.memory_bytes
    speed = entry.tokens_per_s
    broken = []

    if (limit := limits.max_bytes) and size > limit:
        message = f"{size:,} bytes, over {limit:,}"
        broken.append(_BrokenLimit(size / limit, message, f"--max-bytes {size}"))

    if (limit := limits.max_memory_bytes) and memory > limit:
        message = f"{memory:,} bytes of memory, over {limit:,}"
        broken.append(_BrokenLimit(memory / limit, message, f"--max-memory {memory}"))

    if (min_speed := limits.min_tokens_per_s) and speed < min_speed:
        message = f"{speed:,.1f} tokens/s, below {min_speed:g}"
        allowed = math.floor(100 * speed) / 100  # rounded down, so that it would pass
        broken.append(_BrokenLimit(min_speed / speed, message, f"--min-tokens-per-s {allowed:g}"))

    return broken


def find_nearest(entries: Sequence[Entry], limits: Constraints) -> tuple[Entry, str]:
    """Return the candidate nearest to the limits, and the options under which it meets them."""
    nearest = min(
        entries,
        key=lambda entry: math.prod(each.factor for each in _list_broken(entry, limits)),
    )
    options = [each.option for each in _list_broken(nearest, limits)]
    return nearest, " ".join(options)


def find_pareto_front(entries: Iterable[Entry]) -> frozenset[str]:
    """Return the names on the Pareto front of size, speed and KL."""
    return find_non_dominated(
        {entry.name: (-entry.size_bytes, entry.tokens_per_s, -entry.distance) for entry in entries}
    )


def order_entries(entries: Iterable[Entry], objective: Objective) -> list[Entry]:
    """Return candidates in the order of their making: kinds take turns, dense ones first.

    For accuracy, the largest of each kind goes first. Otherwise the useful size is not known yet:
    the middle one goes first, then both ends, then those between.
    """
    entries_by_kind: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        entries_by_kind[entry.spec.kind].append(entry)

    rows = []
    for group in entries_by_kind.values():
        group.sort(key=lambda entry: -entry.size_bytes)
        first = () if objective == "accuracy" else (len(group) // 2, -1, 0)
        in_order = [*(group[index] for index in first), *group]
        rows.append([*{entry.name: entry for entry in in_order}.values()])

    turns = zip_longest(*rows)
    return [entry for turn in turns for entry in turn if entry]

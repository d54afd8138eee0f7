"""What a candidate takes, predicted before it is made: bytes, memory, and speed on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy.decoding.engine import Progress
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.pipeline.job import Job
from racdeploy.report.tuning import DeviceRow, Wishes
from racdeploy.sparse_kernels import Mode
from racdeploy.storage.cores import available_cores
from racdeploy.storage.files import canonical_hash
from racdeploy.targets import Device, Target
from racdeploy.tune.candidates import Choice
from racdeploy.tune.devices.engines import ONNXRUNTIME
from racdeploy.tune.devices.fit import Sample
from racdeploy.tune.devices.measured import find_device
from racdeploy.tune.devices.profile import measure
from racdeploy.tune.devices.speed import predict, predict_memory
from racdeploy.tune.devices.work import Use
from racdeploy.tune.entries import Entry, Takes, list_broken
from racdeploy.tune.sizes import Size, Sizes

_FLOAT_BYTES = 4
_MEASURED_TOKENS = 64  # of each answer, where an artifact is timed


@dataclass(frozen=True)
class Predictor:
    """Predicts for the candidates of one job; ``scratch`` is a folder for skeletons of models."""

    job: Job
    work: Path
    scratch: Path
    threads: int = 0
    progress: Progress | None = None

    @cached_property
    def target(self) -> Target:
        """Where the models will run."""
        return Target.read(self.job.recipe.target)

    @cached_property
    def device(self) -> Device:
        """The target's device, or this machine, measured once."""
        kernels = self.job.recipe.tune.accel
        if known := self.target.device:
            return known.without_kernels() if kernels == "off" else known
        return find_device(
            self.work,
            self.scratch,
            self.job.backend,
            self.threads,
            self.progress,
            kernels=kernels,
        )

    @property
    def device_row(self) -> DeviceRow:
        """The device as the report has it."""
        device = self.device
        return DeviceRow(
            name=device.name,
            measured=device.measured,
            source=device.source,
            cores=device.cores,
        )

    @property
    def note(self) -> str:
        """What a reader must know of the figures; mostly nothing."""
        engine = self.job.backend
        if engine not in self.device.engines:
            return (
                f"nobody has measured {engine} there: its speeds and memory are predicted as if "
                "the bytes of the weights alone decided them"
            )

        if self.device.costs(engine).sparse:
            return (
                "speeds and memory of zeros are those with racdeploy's sparse kernels, which a "
                "stock engine has not: --set tune.accel=off counts without them"
            )
        return self._note_graph() if engine == ONNXRUNTIME else ""

    def _note_graph(self) -> str:
        """Say where another program writes the graph than the one whose graphs were measured."""
        from racdeploy.export.onnx.choice import find_refusal

        exporter = self.job.recipe.export.exporter
        refusal = find_refusal(self.job.checkpoint, "genai")
        if exporter in ("auto", "genai") and not refusal:
            return ""
        return (
            "speeds and memory are those of graphs by onnxruntime-genai's builder, which does not "
            f"write this one: {refusal or f'the recipe says {exporter}'}"
        )

    def predict(self, choice: Choice) -> Takes:
        """Return what a candidate takes."""
        size = self.size(choice)
        engine = self.job.backend
        if engine not in self.device.engines:
            return self._bound(size)

        context_tokens = self.job.recipe.verify.context_tokens
        usual = Use(context_tokens)
        found = predict(self.device, size.work, usual)

        # Memory has to do for the longest answer.
        filled = replace(usual, new_tokens=max(1, context_tokens - usual.prompt_tokens))

        return Takes(
            size_bytes=size.size_bytes,
            memory_bytes=predict_memory(self.device, size.work, filled),
            tokens_per_s=found.tokens_per_s,
        )

    def measure(self, file: Path) -> Sample | None:
        """Decode with an artifact alone, where the device is this machine; else return None."""
        if self.target.device:
            return None

        context_tokens = self.job.recipe.verify.context_tokens
        prompt_tokens = context_tokens // 4
        new_tokens = min(_MEASURED_TOKENS, prompt_tokens)
        use = Use(context_tokens, prompt_tokens, new_tokens)
        kernels: Mode = "off" if self.job.recipe.tune.accel == "off" else "auto"
        return measure(file, use, self.threads or available_cores(), self.job.backend, kernels)

    def _bound(self, size: Size) -> Takes:
        """Return what a candidate takes at least, of an engine that nobody has measured."""
        checkpoint = size.checkpoint
        width = checkpoint.key_value_heads * checkpoint.head_size
        values = 2 * width * sum(checkpoint.attends)
        cache_bytes = _FLOAT_BYTES * values * self.job.recipe.verify.context_tokens

        known = self.device.engines.values()
        base_bytes = max(costs.base_bytes for costs in known)
        whole = replace(size.work, sparse={})
        speed = self.device.bandwidth_bytes_per_s / whole.read_bytes
        beside_bytes = size.work.kept_bytes + max(cache_bytes, size.work.passing_bytes)

        return Takes(
            size_bytes=size.size_bytes,
            memory_bytes=base_bytes + size.plain_bytes + round(beside_bytes),
            tokens_per_s=speed,
        )

    def size(self, choice: Choice) -> Size:
        """Return the size of a candidate's file, and its tensors."""
        known = self._known
        if choice.name not in known:
            known[choice.name] = self._sizes.predict(choice.job)
        return known[choice.name]

    def list_formats(self, choice: Choice) -> list[str]:
        """Return the number format of each matrix of a candidate's file, in its order.

        Of a graph that another program writes, it is the one that is asked for.
        """
        tensors = self.size(choice).tensors
        if not tensors:
            return [choice.recipe.export.quant]
        return [tensor.quant_real for tensor in tensors if _has_choice(tensor)]

    def find_twin(self, choice: Choice) -> str:
        """Return the name of an earlier candidate with the same file, or an empty string."""
        first = self._described.setdefault(self._describe(choice), choice.name)
        return "" if first == choice.name else first

    def _describe(self, choice: Choice) -> str:
        """Return what is the same for two candidates with one file."""
        recipe = choice.recipe
        prune = recipe.prune
        return canonical_hash(
            [
                self.list_formats(choice),
                recipe.structure.keep,
                [prune.sparsity, prune.pattern, prune.shares, prune.joint],
                recipe.recover.tokens,
                recipe.export.packing,
            ]
        )

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes(self.scratch)

    @cached_property
    def _known(self) -> dict[str, Size]:
        return {}

    @cached_property
    def _described(self) -> dict[str, str]:
        return {}


def find_nearest(entries: Sequence[Entry], wishes: Wishes) -> tuple[Entry, str]:
    """Return the candidate that is nearest to the limits, and the wish that it would keep."""
    if wishes.max_bytes:
        smallest = min(entries, key=lambda entry: entry.size_bytes)
        if smallest.size_bytes > wishes.max_bytes:
            return smallest, f"--max-bytes {smallest.size_bytes}"

    if wishes.min_tokens_per_s:
        fastest = max(entries, key=lambda entry: entry.takes.tokens_per_s)
        speed = fastest.takes.tokens_per_s
        if speed < wishes.min_tokens_per_s:
            return fastest, f"--min-tokens-per-s {_round_down(speed)}"

    least = min(entries, key=lambda entry: entry.takes.memory_bytes)
    if wishes.max_memory_bytes and least.takes.memory_bytes > wishes.max_memory_bytes:
        return least, f"--max-memory {least.takes.memory_bytes}"

    # Each limit can be kept, and not all of them together.
    nearest = min(entries, key=lambda entry: (len(list_broken(entry, wishes)), entry.size_bytes))
    kept = (
        f"--max-bytes {nearest.size_bytes}",
        f"--max-memory {nearest.takes.memory_bytes}",
        f"--min-tokens-per-s {_round_down(nearest.takes.tokens_per_s)}",
    )
    return nearest, " ".join(kept)


def _round_down(speed: float) -> str:
    """Return three digits of a speed that it surely has."""
    digits = math.floor(math.log10(speed))
    step = 10.0 ** (digits - 2)
    steps = math.floor(speed / step)
    return f"{steps * step:g}"


def _has_choice(tensor: PlannedTensor) -> bool:
    """Return whether a number format was chosen for a tensor."""
    return len(tensor.shape) > 1 and tensor.quant_real != "f32"

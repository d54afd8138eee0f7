"""Predicted against measured, for each candidate: bytes, memory at the peak, tokens a second.

    python -m benchmarks.predicted --threads 1
    python -m benchmarks.predicted --threads 1 --engine onnxruntime
    python -m benchmarks.predicted --threads 1 --zeros

Both models are exported for real. Synthetic models, of which the device's profile is made, and the
candidates are decoded in turns, round after round, so that both meet the same machine. Prints a
row for each candidate, and ends with 1 where a bar is missed: the bytes themselves (of ONNX, half a
per cent: another program writes the graph), 5 % of the memory, 15 % of the speed.

With ``--zeros`` candidates have zeros, and run on the sparse kernels that ``racdeploy-kernels
prove`` found faster here.

With ``--work`` files and samples are kept there, so that several short runs count together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median_low
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from racdeploy import sparse_kernels
from racdeploy.export.gguf import export as export_gguf
from racdeploy.export.onnx import export as export_onnx
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import describe_model
from racdeploy.pipeline.structure import expect_shape
from racdeploy.prune.assemble import Shape, assemble
from racdeploy.recipe import Recipe, Zeros, count_zeros
from racdeploy.storage.addresses import code_hash
from racdeploy.storage.caches import default_work
from racdeploy.storage.safetensors import write_header
from racdeploy.tune.devices.engines import LLAMACPP, ONNXRUNTIME
from racdeploy.tune.devices.fit import Sample
from racdeploy.tune.devices.kernels import name_zeros
from racdeploy.tune.devices.profile import Profiler, measure
from racdeploy.tune.devices.speed import Prediction, predict
from racdeploy.tune.devices.synthetic import find_least
from racdeploy.tune.devices.work import Use
from racdeploy.tune.sizes import Size, Sizes

USE = Use(context_tokens=2048, prompt_tokens=256, new_tokens=48)
MOST_MEMORY, MOST_SPEED = 0.05, 0.15
MOST_BYTES = {LLAMACPP: 0.0, ONNXRUNTIME: 0.005}
FORMATS = {LLAMACPP: "gguf", ONNXRUNTIME: "onnx"}


@dataclass(frozen=True)
class Case:
    """A number format, what stays of the channels, and zeros."""

    quant: str
    share: float = 1.0
    zeros: Zeros = 0.0

    @property
    def name(self) -> str:
        if self.zeros:
            return f"{self.quant}, zeros {name_zeros(self.zeros)}"
        return self.quant + (f", {self.share:.0%} of the channels" if self.share < 1 else "")


CASES: dict[str, dict[str, tuple[Case, ...]]] = {
    # By engine and model.
    LLAMACPP: {
        "tiny-reasoner": (
            *(Case("f16"), Case("q8_0"), Case("q4_k_m"), Case("q2_k")),
            Case("q4_0", 0.5),
        ),
        "smol-reasoner": (
            *(Case("q8_0"), Case("q4_0"), Case("q4_k_m"), Case("q2_k")),
            Case("q3_k", 0.75),
        ),
    },
    ONNXRUNTIME: {
        "tiny-reasoner": (
            *(Case("f32"), Case("f16"), Case("matmulnbits_8"), Case("k_quant")),
            Case("matmulnbits_4", 0.5),
        ),
        "smol-reasoner": (Case("matmulnbits_8"), Case("k_quant"), Case("matmulnbits_4", 0.75)),
    },
}
SPARSE = {
    # Of llama.cpp, by model.
    "tiny-reasoner": (
        *(Case("q8_0", zeros=0.5), Case("q8_0", zeros="2:4"), Case("q4_0", zeros=0.6)),
        *(Case("q4_0", zeros="2:4"), Case("q3_k", zeros="2:4")),
    ),
    "smol-reasoner": (
        *(Case("q8_0", zeros=0.5), Case("q8_0", zeros=0.6), Case("q8_0", zeros="2:4")),
        *(Case("q4_0", zeros=0.5), Case("q4_0", zeros=0.7), Case("q4_0", zeros="2:4")),
    ),
}


@dataclass
class Candidate:
    """One artifact, written for real, and what was predicted of it."""

    name: str
    file: Path
    size: Size
    samples: list[Sample] = field(default_factory=list)


def main() -> None:
    """Export, measure in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=sorted(FORMATS), default=LLAMACPP)
    parser.add_argument("--zeros", action="store_true", help="candidates that kernels run")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smol", default=str(default_work() / "smol-reasoner"))
    parser.add_argument("--work", type=Path, help="keeps files and samples for the next run")
    arguments = parser.parse_args()

    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        kept = arguments.work or scratch / "kept"
        kept.mkdir(parents=True, exist_ok=True)

        cases = SPARSE if arguments.zeros else CASES[arguments.engine]
        candidates = list(write_candidates(scratch, kept, arguments.smol, arguments.engine, cases))
        faster_from = sparse_kernels.faster_from(arguments.threads) if arguments.zeros else {}
        profiler = Profiler(
            scratch, arguments.threads, engines=[arguments.engine], faster_from=faster_from
        )
        kernels: sparse_kernels.Mode = "require" if arguments.zeros else "off"
        record = kept / f"{arguments.engine}-{profiler.threads}{'-zeros' * arguments.zeros}.json"
        read_samples(record, profiler, candidates)

        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            profiler.run_round()
            for candidate in candidates:
                sample = measure(candidate.file, USE, profiler.threads, arguments.engine, kernels)
                candidate.samples.append(sample)
            write_samples(record, profiler, candidates)

    if not candidates[0].samples:
        return  # --rounds 0 writes the files

    device = profiler.fit()
    rows, missed = [], 0
    for candidate in candidates:
        predicted = predict(device, candidate.size.work, USE)
        row, is_missed = compare(candidate, predicted, MOST_BYTES[arguments.engine])
        rows.append(row)
        missed += is_missed

    columns = (
        *("candidate", "bytes predicted", "written", "memory MB predicted", "measured", "ratio"),
        *("tokens/s predicted", "measured", "ratio"),
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(f"{len(candidates) - missed} of {len(candidates)} candidates within all bars")
    sys.exit(1 if missed else 0)


def read_samples(record: Path, profiler: Profiler, candidates: list[Candidate]) -> None:
    """Take the samples of earlier runs of the same code."""
    if not record.is_file():
        return

    found = json.loads(record.read_text())
    if found.get("code") != code_hash(measure.__module__):
        return

    for piece in profiler.pieces:
        samples = [Sample(**each) for each in found["pieces"][piece.name]]
        profiler.samples[piece.engine, piece.name] = samples
    for candidate in candidates:
        candidate.samples += [Sample(**each) for each in found["candidates"][candidate.name]]


def write_samples(record: Path, profiler: Profiler, candidates: list[Candidate]) -> None:
    """Keep all samples for a later run."""
    pieces = {name: [*map(asdict, own)] for (_, name), own in profiler.samples.items()}
    own = {candidate.name: [*map(asdict, candidate.samples)] for candidate in candidates}
    code = code_hash(measure.__module__)
    record.write_text(json.dumps({"code": code, "pieces": pieces, "candidates": own}))


def write_candidates(
    scratch: Path, kept: Path, smol: str, engine: str, cases: Mapping[str, Sequence[Case]]
) -> Iterator[Candidate]:
    """Export every candidate; what is predicted of it comes first, from the dense model alone."""
    sizes = Sizes(scratch / "sketches")
    places = {"tiny-reasoner": "tiny-reasoner", "smol-reasoner": smol}
    form = FORMATS[engine]

    for model, own in cases.items():
        for case in own:
            job = make_job(places[model], case, form)
            is_dense = case == Case(case.quant)
            size = sizes.predict(job, pruned=not is_dense)
            zeros = f"-{name_zeros(case.zeros).replace(':', 'of')}" * bool(case.zeros)
            file = kept / f"{model}-{case.quant}-{case.share:g}{zeros}.{form}"

            if not file.is_file():
                write = export_gguf if form == "gguf" else export_onnx
                checkpoint, metadata = job.checkpoint, {}
                if not is_dense:
                    change = add_zeros if case.zeros else cut_channels
                    checkpoint = Checkpoint(change(job, scratch / file.stem))
                    metadata = describe_model(job, checkpoint)
                write(checkpoint, file, quant=case.quant, metadata=metadata)

            yield Candidate(f"{model} {case.name}", file, size)


def make_job(model: str, case: Case, target: str) -> Job:
    """Return the job of a cut or of zeros, in a number format."""
    structure = {"keep": {"ffn": case.share} if case.share < 1 else {}, "optional": False}
    is_pattern = isinstance(case.zeros, str)
    prune = {
        "pattern": case.zeros if is_pattern else "unstructured",
        "sparsity": count_zeros(case.zeros),
    }
    options = {
        "model": model,
        "target": target,
        "export": {"quant": case.quant},
        "prune": prune if case.zeros else {},
    }
    recipe = Recipe.combine(None, options)
    whole = recipe.structure.model_copy(update=structure)
    return Job(recipe.model_copy(update={"structure": whole}))


def add_zeros(job: Job, out: Path) -> Path:
    """Write a model whose small weights are zeros; which ones decides neither bytes nor speed."""
    prune = job.recipe.prune
    zeros: Zeros = prune.pattern if prune.kept_of else prune.sparsity
    pieces = out.with_name(f"{out.name}-pieces")
    pieces.mkdir()

    for block in range(job.checkpoint.block_count):
        tensors = {}
        for name in job.weights_to_prune:
            if name.startswith(f"{job.checkpoint.family.blocks}.{block}."):
                value = job.checkpoint.read(name).astype(np.float32)
                value[find_least(np.abs(value), zeros)] = 0
                tensors[name] = value
        write_piece(pieces / f"block-{block:05d}.safetensors", tensors)

    return assemble(job.checkpoint, pieces, out)


def cut_channels(job: Job, out: Path) -> Path:
    """Write a model whose blocks keep the first of their channels, half of them fewer than others.

    What stays decides neither bytes nor speed.
    """
    checkpoint, family = job.checkpoint, job.checkpoint.family
    shape = vary(expect_shape(checkpoint, job.structure), job.structure.multiple)
    pieces = out.with_name(f"{out.name}-pieces")
    pieces.mkdir()

    for block in shape.blocks:
        kept = {"F": np.arange(shape.sizes(checkpoint, block)["F"])}
        tensors = {}
        for inside in family.block_tensors:
            name = f"{family.blocks}.{block}.{inside}"
            if name in checkpoint.entries:
                value = checkpoint.read(name)
                found = widths.find_kept(family, inside, kept, checkpoint.sizes(block))
                for axis, index in enumerate(found):
                    value = value if index is None else np.take(value, index, axis)
                tensors[name] = np.ascontiguousarray(value)

        write_piece(pieces / f"block-{block:05d}.safetensors", tensors)

    return assemble(checkpoint, pieces, out, shape)


def write_piece(file: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write the weights of one block."""
    with file.open("wb") as stream:
        write_header(stream, {name: ("F32", value.shape) for name, value in tensors.items()})
        for value in tensors.values():
            stream.write(value.tobytes())


def vary(shape: Shape, step: int) -> Shape:
    """Return a shape of the same sum, whose first block has fewer channels and the second more."""
    channels = list(shape.widths["intermediate_size"])
    channels[0] -= step
    channels[1] += step
    return Shape(shape.blocks, {**shape.widths, "intermediate_size": tuple(channels)})


def compare(
    candidate: Candidate, predicted: Prediction, most_bytes: float
) -> tuple[tuple[str, ...], bool]:
    """Return the row of a candidate, and whether it misses a bar."""
    written = candidate.samples[0].file_bytes
    memory = median_low(sample.peak_rss_bytes for sample in candidate.samples)
    speed = 1 / median_low(sample.token_s for sample in candidate.samples)

    memory_ratio = predicted.memory_bytes / memory
    speed_ratio = predicted.tokens_per_s / speed
    bytes_ratio = candidate.size.size_bytes / written
    is_missed = (
        abs(bytes_ratio - 1) > most_bytes
        or abs(memory_ratio - 1) > MOST_MEMORY
        or abs(speed_ratio - 1) > MOST_SPEED
    )

    row = (
        candidate.name,
        f"{candidate.size.size_bytes:,}",
        f"{written:,}" if written != candidate.size.size_bytes else "the same",
        f"{predicted.memory_bytes / 1e6:.1f}",
        f"{memory / 1e6:.1f}",
        f"{memory_ratio:.3f}",
        f"{predicted.tokens_per_s:.1f}",
        f"{speed:.1f}",
        f"{speed_ratio:.2f}",
    )
    return row, is_missed


if __name__ == "__main__":
    main()

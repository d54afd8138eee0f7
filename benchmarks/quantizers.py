r"""Which quantizer keeps a reasoning model nearest to the dense one, at the same number format?

    python -m benchmarks.quantizers --out build/quantizers --prompts 200
    python -m benchmarks.quantizers --out build/quantizers --prompts 200 --cut-blocks 1 --onnx \
        --autoround-python VENV/bin/python      # pip install auto-round gguf

Compares llama.cpp's own ``llama_model_quantize`` (without importance, with that of the model's own
traces, and with that of general text), Intel AutoRound, and racdeploy's optimized rounding, which
calibrate on the same traces. Embedding and head have 8 bits in each file. ``--cut-blocks`` adds
``--prune-layers`` of llama.cpp, for the blocks that change the hidden states least, beside
``--keep blocks``; ``--onnx`` adds the quantizers of onnxruntime and onnxruntime-genai.

KL(dense || quantized) is in nats a token, in float32 under torch with the dequantized linears of
each file, so that no engine's own rounding counts; ONNX graphs run on onnxruntime. It is measured
on completions of held-out traces, and on text that calibrates nothing. Ratios have 95 % intervals
over whole sequences, drawn in pairs. Seconds are the processor's, without imports; memory is the
peak of the process. AutoRound's answers are of a file in F32, others of their own file.

Each finished cell is kept in its folder under --out, as row.json, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._quantizing import (
    FILE_TYPES,
    ONNX,
    Logits,
    Row,
    describe,
    list_linears,
    llama_quantize,
    torch_logits,
)
from benchmarks._setup import with_settings
from racdeploy import exporting
from racdeploy.engines import open_engine
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import ExportResult
from racdeploy.files.caches import default_work_folder
from racdeploy.files.writing import canonical_hash, file_sha256, write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Export, Recipe
from racdeploy.recipe_settings import nest_settings
from racdeploy.traces.trace import Trace, TraceSet, hash_ids

ROOT = Path(__file__).parents[1]
ARMS = ("nearest", "importance", "general importance", "autoround", "ours")
CUT_ARMS = ("prune-layers", "ours, cut")
ONNX_ARMS = ("onnxruntime", "genai", "ours")
ROW_TOKENS = 256
"""Tokens of a row of text, and of traces for AutoRound, which skips all that is shorter."""


def main() -> None:
    """Measure every cell and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--tasks", nargs="*", default=[], help="all procedural ones by default")
    parser.add_argument("--quants", nargs="*", default=list(FILE_TYPES), choices=list(FILE_TYPES))
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], help="split of the traces")
    parser.add_argument("--traces", type=int, default=192, help="that calibrate")
    parser.add_argument("--held-out", type=int, default=64, help="more traces, and rows of text")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--text", type=Path, help="plain text; default: Python's reference")
    parser.add_argument("--prompts", type=int, default=0, help="to answer; 0: none")
    parser.add_argument("--autoround-python", help="without it, that arm is left out")
    parser.add_argument("--autoround-iterations", type=int, default=200)
    parser.add_argument("--cut-blocks", type=int, default=0, help="blocks to remove")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)

    bench = Benchmark(arguments)
    for cell in bench.list_cells():
        bench.measure(*cell)
        rows = [json.loads(file.read_text()) for file in arguments.out.glob("*/row.json")]
        write_atomic(arguments.out / "table.md", make_tables(rows))

    print((arguments.out / "table.md").read_text(encoding="utf-8"))


@dataclass
class Benchmark:
    """The data that all cells share."""

    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        arguments = self.arguments
        self.build = Build(Job(self._recipe("q8_0")), arguments.work, arguments.threads)
        self.checkpoint = self.build.job.checkpoint
        self.traces = self.build.traces()[1]
        self.text_rows = self._read_text()

        identity = [self.checkpoint.sha256, hash_ids(self.traces), arguments.traces]
        identity.append(canonical_hash(self.text_rows))
        file = arguments.out / "data.json"
        if file.is_file() and json.loads(file.read_text()) != identity:
            raise SystemExit(f"{file} is of other traces, text or model: choose another --out")
        write_atomic(file, json.dumps(identity))

    def list_cells(self) -> Iterator[tuple[int, str, str]]:
        """Yield seed, number format and arm of each cell."""
        arguments = self.arguments
        arms = [a for a in arguments.arms if a != "autoround" or arguments.autoround_python]
        for seed in arguments.seeds:
            for quant in arguments.quants:
                yield from ((seed, quant, arm) for arm in arms)
                if arguments.cut_blocks:
                    yield from ((seed, quant, arm) for arm in CUT_ARMS)
            if arguments.onnx:
                yield from ((seed, ONNX, arm) for arm in ONNX_ARMS)

    def measure(self, seed: int, quant: str, arm: str) -> Row:
        """Do what is missing of a cell: quantize it, compare it, answer with it; return its row."""
        arguments = self.arguments
        folder = arguments.out / f"{quant}-{arm}-{seed}".replace(", ", "-").replace(" ", "-")
        file = folder / "row.json"
        row: Row = {"quant": quant, "arm": arm, "seed": seed}
        if file.is_file():
            row = json.loads(file.read_text())
        else:
            row |= self._quantize(seed, quant, arm, folder)
            with open_logits(quant, row, arguments.threads) as logits:
                row |= self.compare(seed, logits)
            write_atomic(file, json.dumps(row))

        if arguments.prompts and row.get("prompts") != arguments.prompts:
            row |= self._answer(quant, arm, row)
            write_atomic(file, json.dumps(row))
        return row

    def compare(self, seed: int, logits: Logits) -> Row:
        """Return the KL divergence on held-out traces and on held-out text."""
        traces = [(trace.ids, len(trace.prompt_ids)) for trace in self.split(seed)[1]]
        text = [(ids, 1) for ids in self.text_rows[-self.arguments.held_out :]]
        return {
            "traces": measure_kl(self._dense, logits, traces),
            "text": measure_kl(self._dense, logits, text),
        }

    @cached_property
    def _dense(self) -> Logits:
        return torch_logits(load_model(self.checkpoint))

    def _recipe(self, quant: str) -> Recipe:
        return Recipe.combine(None, nest_settings(list_options(self.arguments, quant)))

    def split(self, seed: int) -> tuple[list[Trace], list[Trace]]:
        """Return the traces that calibrate and those that are held out."""
        order = np.random.default_rng(seed).permutation(len(self.traces))
        shuffled = [self.traces[index] for index in order]
        return shuffled[: self.arguments.traces], shuffled[self.arguments.traces :]

    def _read_text(self) -> list[list[int]]:
        """Return the rows of the text, of which the last are held out."""
        text = "\n".join(pydoc_data.topics.topics.values())
        if self.arguments.text:
            text = self.arguments.text.read_text(encoding="utf-8")
        rows = cut_rows(self.build.job.encoder.encode_text(text))
        if len(rows) < 2 * self.arguments.held_out:
            raise SystemExit(f"the text has {len(rows)} rows of {ROW_TOKENS} tokens: too few")
        return rows

    def _quantize(self, seed: int, quant: str, arm: str, folder: Path) -> Row:
        """Quantize in a process of its own; return its cost and its files."""
        arguments = self.arguments
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        folder.mkdir()
        calibration, _ = self.split(seed)
        TraceSet(folder).append(0, calibration)
        rows = cut_rows([token for trace in calibration for token in trace.ids])
        if arm == "general importance":
            rows = self.text_rows[: -arguments.held_out][: len(rows)]
        write_atomic(folder / "rows.json", json.dumps(rows))

        options = list_options(arguments, quant)
        if arm == "ours, cut":
            blocks = self.checkpoint.shape.block_count
            options["structure"] = {"keep": {"blocks": 1 - arguments.cut_blocks / blocks}}
        job = {
            "arm": arm,
            "quant": quant,
            "seed": seed,
            "threads": arguments.threads,
            "cut_blocks": arguments.cut_blocks,
            "iterations": arguments.autoround_iterations,
            "recipe": options,
            "model": str(self.checkpoint.folder.resolve()),
            "folder": str(folder),
            "rows": str(folder / "rows.json"),
            "source": str(self._write_f32(quant)),
        }
        command = [sys.executable, "-m", "benchmarks._quantizing"]
        if arm == "autoround":
            command = [arguments.autoround_python, "benchmarks/_autoround.py"]
        child = subprocess.run(
            [*command, json.dumps(job)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)},
        )
        if child.returncode:
            raise SystemExit(f"{folder.name} failed:\n{child.stderr[-3000:]}")

        row: Row = json.loads(child.stdout.splitlines()[-1])
        return row | self._export_autoround(folder, quant) if arm == "autoround" else row

    def _write_f32(self, quant: str) -> Path:
        """Return the dense model in F32, in the format of the quantizers."""
        name = "onnx" if quant == ONNX else "gguf"
        file: Path = self.arguments.out / "f32" / f"model.{name}"
        if not file.is_file():
            exporting.write(self.checkpoint, file, Export(format=name, quant="f32"))
        return file

    def _export_autoround(self, folder: Path, quant: str) -> Row:
        """Write AutoRound's dequantized linears as GGUF in F32; its bytes are the format's."""
        model = assemble(self.checkpoint, folder, folder / "model")
        file = folder / "dequantized.gguf"
        exporting.write(Checkpoint(model), file, Export(quant="f32"))
        nearest = llama_quantize(self._write_f32(quant), folder / "nearest.gguf", quant)
        size_bytes = nearest.stat().st_size
        nearest.unlink()
        return {**describe(file, model), "size_bytes": size_bytes}

    def _answer(self, quant: str, arm: str, row: Row) -> Row:
        """Return right answers and mean thinking tokens of a file on its engine."""
        file = Path(row["file"])
        files = {name: file_sha256(file.parent / name) for name in row["files"]}
        build = Build(Job(self._recipe(quant)), self.arguments.work, self.arguments.threads)
        exported = ExportResult(file, (), row["size_bytes"], files)
        records = build.evaluation.answer(exported, arm, self.checkpoint.folder).records
        thinking = sum(record.thinking_tokens for record in records) / len(records)
        right = sum(record.correct for record in records)
        return {"prompts": self.arguments.prompts, "right": right, "thinking": thinking}


def list_options(arguments: argparse.Namespace, quant: str) -> dict[str, Any]:
    """Return the recipe of optimized rounding alone, without zeros, on all traces that it gets."""
    options = {
        "model": arguments.model,
        "target": "onnx" if quant == ONNX else "gguf",
        "tasks": tuple(arguments.tasks),
        "traces": {
            "count": arguments.traces + arguments.held_out,
            "max_new_tokens": arguments.max_new_tokens,
        },
        "calibration": {"held_out_share": 0.0, "keep_truncated": True},
        "prune": {"sparsity": 0.0},
        "export": {"quant": quant, "rounding": "optimized"},
        "verify": {"count": max(arguments.prompts, 1), "parallel": 32},
    }
    return with_settings(options, arguments.set)


def cut_rows(ids: Sequence[int]) -> list[list[int]]:
    """Return token ids in whole rows of :data:`ROW_TOKENS`."""
    ends = range(ROW_TOKENS, len(ids) + 1, ROW_TOKENS)
    return [list(ids[end - ROW_TOKENS : end]) for end in ends]


@contextmanager
def open_logits(quant: str, row: Row, threads: int) -> Iterator[Logits]:
    """Open a quantized file: under torch with its linears, a graph on onnxruntime."""
    if quant == ONNX:
        settings = EngineSettings(2048, 1, threads, "f32")
        with open_engine("onnxruntime", Path(row["file"]), settings) as engine:
            yield lambda ids: torch.from_numpy(engine.logits(ids))
        return

    checkpoint = Checkpoint(Path(row["model"]))
    model = load_model(checkpoint)
    for name, weight_OI in read_linears(Path(row["file"]), checkpoint):
        model.get_parameter(name).data.copy_(torch.from_numpy(weight_OI))
    yield torch_logits(model)


def read_linears(file: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the dequantized linears of a GGUF file by their names in the checkpoint."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for tensor in list_linears(checkpoint):
        packed = stored[tensor.name]
        weight_OI = gguf.dequantize(packed.data, packed.tensor_type).reshape(tensor.shape)
        order_O = tensor.conversion.order_O
        if order_O is not None:
            weight_OI = weight_OI[np.argsort(order_O)]
        yield tensor.source, np.ascontiguousarray(weight_OI, np.float32)


@torch.inference_mode()
def measure_kl(
    dense: Logits, quantized: Logits, sequences: Sequence[tuple[Sequence[int], int]]
) -> dict[str, Any]:
    """Return KL(dense || quantized): the mean, and sum and tokens of each sequence.

    Args:
        sequences: token ids, and the index of the first one whose prediction counts.
    """
    sums, tokens = [], []
    for ids, first in sequences:
        log_p_TV, log_q_TV = (
            logits(ids)[first - 1 : -1].double().log_softmax(-1) for logits in (dense, quantized)
        )
        sums.append(float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum()))
        tokens.append(len(log_p_TV))

    return {"kl": sum(sums) / sum(tokens), "sums": sums, "tokens": tokens}


def interval_of_ratio(sums: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of two sums over the same sequences, and its 95 % interval."""
    drawn = np.random.default_rng(0).integers(0, len(sums), (10_000, len(sums)))
    ratios = np.asarray(sums)[drawn].sum(1) / np.asarray(others)[drawn].sum(1)
    lower, upper = np.quantile(ratios, [0.025, 0.975])
    return sum(sums) / sum(others), float(lower), float(upper)


def make_tables(rows: Sequence[Row]) -> str:
    """Return Markdown: a line for each cell, and optimized rounding beside AutoRound."""
    cells = {(row["quant"], row["seed"], row["arm"]): row for row in rows}
    lines = [
        "| format | seed | quantizer | bytes | KL, traces | ratio (95 %) | KL, text | ratio (95 %) "
        "| right | thinking | CPU s | peak MiB |",
        "|---" * 12 + "|",
    ]
    for quant, seed, arm in sorted(cells, key=_order):
        row = cells[quant, seed, arm]
        first = cells.get((quant, seed, _first_arm(quant, arm)), row)
        shown = [quant, str(seed), arm, f"{row['size_bytes']:,}"]
        for kind in ("traces", "text"):
            shown += [f"{row[kind]['kl']:.2e}", "" if row is first else _ratio(row, first, kind)]
        shown += ["", ""]
        if "prompts" in row:
            shown[-2:] = [f"{row['right']} of {row['prompts']}", f"{row['thinking']:.1f}"]
        shown += [f"{row['cpu_s']:.1f}", f"{row['peak_bytes'] / 2**20:,.0f}"]
        lines.append(f"| {' | '.join(shown)} |")

    lines += ["", "| format | seed | ours / AutoRound: KL, traces | median | KL, text | CPU s |"]
    lines.append("|---" * 6 + "|")
    for quant, seed, arm in sorted(cells, key=_order):
        ours, other = cells.get((quant, seed, "ours")), cells[quant, seed, arm]
        if arm == "autoround" and ours:
            medians = _median(ours) / _median(other)
            shown = [quant, str(seed), _ratio(ours, other, "traces"), f"{medians:.2f}"]
            shown += [_ratio(ours, other, "text"), f"{ours['cpu_s'] / other['cpu_s']:.2f}"]
            lines.append(f"| {' | '.join(shown)} |")

    return "\n".join(lines) + "\n"


def _order(cell: tuple[str, int, str]) -> tuple[int, int, int]:
    quant, seed, arm = cell
    return ([*FILE_TYPES, ONNX].index(quant), seed, (*ONNX_ARMS[:2], *ARMS, *CUT_ARMS).index(arm))


def _first_arm(quant: str, arm: str) -> str:
    """Return the arm to which the ratios of another are."""
    arms = CUT_ARMS if arm in CUT_ARMS else ARMS
    return ONNX_ARMS[0] if quant == ONNX else arms[0]


def _median(row: Row) -> float:
    """Return the median over traces: one unsure token may be most of a mean."""
    measured = row["traces"]
    return float(np.median(np.divide(measured["sums"], measured["tokens"])))


def _ratio(row: Row, other: Row, kind: str) -> str:
    ratio, lower, upper = interval_of_ratio(row[kind]["sums"], other[kind]["sums"])
    return f"{ratio:.2f} ({lower:.2f} to {upper:.2f})"


if __name__ == "__main__":
    main()

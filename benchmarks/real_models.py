"""How near, small and fast are the files of a published model: the ones people download, and ours?

    racdeploy build MODEL --tasks TASK --out build/bundle
    python -m benchmarks.real_models MODEL --tasks TASK --files default=build/bundle/….gguf \
        --prompts 1000 --out build/real

Rows: dense Q8_0, llama.cpp's Q4_K_M and Q4_0 with and without an importance matrix of the model's
own traces, AutoRound's Q4_K and Q4_0 (``--autoround-python``), and the files that are named. KL
from the dense model and equal first tokens are of traces and texts by which nothing was chosen or
calibrated. Decoding is relative to dense Q8_0, in rounds in turn. Seconds are the wall clock's.

Each finished row is kept in its folder under --out, as row.json, and is not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from benchmarks._quantizing import Importance, measure_importance
from benchmarks.quantizers import ROOT, cut_rows
from racdeploy import exporting
from racdeploy.engines.decoding_speed import compare_speed
from racdeploy.exporting import ExportResult
from racdeploy.files.writing import file_sha256, write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.divergence_stage import DivergenceMeter
from racdeploy.pipeline.job import Job
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Export, Recipe
from racdeploy.recipe_settings import nest_settings
from racdeploy.traces.trace import Trace

REPORT_SEED = 1_000
"""Of the traces that files are compared on; those of a build have seed 0."""
REPORT_TRACES = 64
DENSE = "dense Q8_0"
Row = dict[str, Any]


def main() -> None:
    """Measure every row and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--files", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these alone, in this order")
    parser.add_argument("--traces", type=int, default=128, help="for importance and AutoRound")
    parser.add_argument("--prompts", type=int, default=0, help="to answer; 0: none")
    parser.add_argument("--max-new-tokens", type=int, default=0)
    parser.add_argument("--autoround-python", help="without it, AutoRound is left out")
    parser.add_argument("--autoround-quants", nargs="*", default=["q4_k", "q4_0"])
    parser.add_argument("--speed", action="store_true", help="time decoding: alone on the machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)

    bench = Benchmark(arguments)
    rows = []
    makers = bench.list_files()
    for name in arguments.rows or makers:
        rows.append(bench.measure(name, makers[name]))
        write_atomic(arguments.out / "table.md", make_table(rows))
    print((arguments.out / "table.md").read_text(encoding="utf-8"))


@dataclass
class Benchmark:
    """What all rows share."""

    arguments: argparse.Namespace

    def list_files(self) -> dict[str, Callable[[Path], Row]]:
        """Return what makes each file, by the name of its row; dense Q8_0 first."""
        makers: dict[str, Callable[[Path], Row]] = {DENSE: self._export_dense}
        for quant in ("Q4_K_M", "Q4_0"):
            makers[f"llama.cpp {quant}"] = _bind(self._quantize, quant, False)
            makers[f"llama.cpp {quant}, importance"] = _bind(self._quantize, quant, True)
        if self.arguments.autoround_python:
            for quant in self.arguments.autoround_quants:
                makers[f"AutoRound {quant.upper()}"] = _bind(self._round, quant)
        for named in self.arguments.files:
            name, _, file = named.partition("=")
            makers[name] = _bind(_describe, Path(file).resolve())
        return makers

    def measure(self, name: str, make: Callable[[Path], Row]) -> Row:
        """Return the row of a file: made, compared, timed and asked where that is missing."""
        folder = self.arguments.out / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(exist_ok=True)
        kept = folder / "row.json"
        row: Row = json.loads(kept.read_text()) if kept.is_file() else {"name": name}
        steps = {"file": lambda: make(folder), "traces": lambda: self._compare(row)}
        if self.arguments.prompts:
            steps["answers"] = lambda: self._answer(row)
        if self.arguments.speed:
            steps["speed"] = lambda: self._time(row)
        for key, step in steps.items():
            if key not in row:
                row |= step()
                write_atomic(kept, json.dumps(row))
        return row

    @cached_property
    def _build(self) -> Build:
        """The build whose traces calibrate."""
        return self._open({"count": self.arguments.traces}, {})

    @cached_property
    def _meter(self) -> DivergenceMeter:
        """Compares on traces that nothing was calibrated on."""
        held_out = {"held_out_share": 0.5}
        return DivergenceMeter(self._open({"count": REPORT_TRACES, "seed": REPORT_SEED}, held_out))

    def _open(self, traces: Row, calibration: Row) -> Build:
        arguments = self.arguments
        limit = arguments.max_new_tokens
        options = {
            "model": str(arguments.model),
            "tasks": tuple(arguments.tasks),
            "traces": {"max_new_tokens": limit} | traces,
            "calibration": {"keep_truncated": True} | calibration,
            "prune": {"sparsity": 0.0},
            "verify": {"count": max(arguments.prompts, 1), "max_new_tokens": limit, "parallel": 32},
        }
        recipe = Recipe.combine(None, nest_settings(options))
        return Build(Job(recipe), arguments.out / "work", arguments.threads).with_answer_limit()

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return self._build.job.checkpoint

    @cached_property
    def _traces(self) -> list[Trace]:
        _, traces = self._build.traces()
        return [*traces]

    @cached_property
    def _importance(self) -> Importance:
        return measure_importance(self._checkpoint, [trace.ids for trace in self._traces])

    def _export_dense(self, folder: Path) -> Row:
        file = folder / "model.gguf"
        exporting.write(self._checkpoint, file, Export(quant="q8_0"))
        return _describe(file, folder)

    def _write_f32(self) -> Path:
        file: Path = self.arguments.out / "model-f32.gguf"
        if not file.is_file():
            exporting.write(self._checkpoint, file, Export(quant="f32"))
        return file

    def _quantize(self, quant: str, is_weighted: bool, folder: Path) -> Row:
        """Quantize with llama.cpp, in its own mix of formats."""
        source = self._write_f32()
        began_s = time.perf_counter()
        entries = self._list_entries() if is_weighted else None
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant}")
        parameters.nthread = self.arguments.threads
        if entries is not None:
            parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
        file = folder / "model.gguf"
        if llama_cpp.llama_model_quantize(
            str(source).encode(), str(file).encode(), ctypes.byref(parameters)
        ):
            raise SystemExit(f"llama.cpp did not quantize to {quant}")
        return _describe(file, folder) | {"seconds": time.perf_counter() - began_s}

    def _list_entries(self) -> Any:
        """Return the importance matrix as llama.cpp reads it; the last entry is empty."""
        entries = (llama_cpp.llama_model_imatrix_data * (len(self._importance) + 1))()
        for entry, (name, mean_I) in zip(entries, self._importance.items(), strict=False):
            entry.name = name.encode()
            entry.size = mean_I.size
            entry.data = mean_I.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return entries

    def _round(self, quant: str, folder: Path) -> Row:
        """Round with AutoRound; its file is in F32, and its bytes are those of its format.

        AutoRound gives all linears one format, so that its bytes are llama.cpp's *pure* file's.
        """
        rows = cut_rows([token for trace in self._traces for token in trace.ids])
        write_atomic(folder / "rows.json", json.dumps(rows))
        job = {
            "model": str(self._checkpoint.folder.resolve()),
            "quant": quant,
            "rows": str(folder / "rows.json"),
            "folder": str(folder),
            "threads": self.arguments.threads,
            "iterations": 200,
            "seed": 0,
        }
        began_s = time.perf_counter()
        threads = {"OMP_NUM_THREADS": str(self.arguments.threads)}
        command = [self.arguments.autoround_python, "benchmarks/_autoround.py", json.dumps(job)]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | threads)
        seconds = time.perf_counter() - began_s

        model = assemble(self._checkpoint, folder, folder / "model")
        file = folder / "model.gguf"
        exporting.write(Checkpoint(model), file, Export(quant="f32"))
        plain = folder / "nearest.gguf"
        exporting.write(self._checkpoint, plain, Export(quant=quant, importance="none"))
        size_bytes = plain.stat().st_size
        plain.unlink()
        return _describe(file, folder) | {"seconds": seconds, "size_bytes": size_bytes}

    def _compare(self, row: Row) -> Row:
        """Return KL and equal first tokens, on traces and on texts."""
        exported = _read_exported(row)
        found = {
            "traces": self._meter.measure(exported).traces,
            "text": self._meter.measure(exported, "report").text,
        }
        return {kind: [each.kl, each.same_share] for kind, each in found.items()}

    def _time(self, row: Row) -> Row:
        """Return the speed of decoding to dense Q8_0, on one thread and on two."""
        if row["name"] == DENSE or row["name"].startswith("AutoRound"):
            return {"speed": []}
        dense = self.arguments.out / DENSE.replace(" ", "-") / "model.gguf"
        file = Path(row["file"])
        ratios = [compare_speed(file, dense, "llamacpp", count).median for count in (1, 2)]
        return {"speed": ratios}

    def _answer(self, row: Row) -> Row:
        """Return right answers, mean thinking tokens and unclosed thoughts."""
        exported = _read_exported(row)
        answers = self._build.evaluation.answer(exported, row["name"], self._checkpoint.folder)
        records = answers.records
        right = sum(record.correct for record in records)
        thinking = sum(record.thinking_tokens for record in records) / len(records)
        return {"answers": [right, len(records), thinking]}


def _bind(make: Callable[..., Row], *values: Any) -> Callable[[Path], Row]:
    return lambda folder: make(*values, folder)


def _describe(file: Path, _: Path) -> Row:
    return {"file": str(file), "size_bytes": file.stat().st_size}


def _read_exported(row: Row) -> ExportResult:
    file = Path(row["file"])
    return ExportResult(file, (), row["size_bytes"], {file.name: file_sha256(file)})


def make_table(rows: list[Row]) -> str:
    """Return Markdown: a line for each file."""
    lines = [
        "| file | MB | KL, traces | equal | KL, text | equal | right | thinking | decoding | s |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        shown = [row["name"], f"{row['size_bytes'] / 1e6:.1f}"]
        for kind in ("traces", "text"):
            kl, same_share = row[kind]
            shown += [f"{kl:.2g}", f"{same_share:.1%}"]
        shown += _show_answers(row.get("answers"))
        shown.append(", ".join(f"{ratio:.2f} ×" for ratio in row.get("speed", ())))
        shown.append(f"{row['seconds']:.0f}" if "seconds" in row else "")
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _show_answers(answers: tuple[int, int, float] | None) -> list[str]:
    if answers is None:
        return ["", ""]
    right, count, thinking = answers
    return [f"{right / count:.1%} of {count:,}", f"{thinking:.1f}"]


if __name__ == "__main__":
    main()

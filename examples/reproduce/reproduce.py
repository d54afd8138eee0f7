"""Build and compare every cell of a model's table; the same command resumes.

    python examples/reproduce/reproduce.py qwen3-0.6b --task math500 --out build/qwen3-0.6b
    python examples/reproduce/reproduce.py qwen3-0.6b --task math500 --dry-run

Each cell is one ``racdeploy build`` with a GGUF file and an ONNX model; its command is printed and
can be run alone. A finished cell is its bundle and is not repeated. ``table.md`` is written after
every cell.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from racdeploy import plugins
from racdeploy.models.sources import resolve_model
from racdeploy.processes.cores import available_cores
from racdeploy.results.answers import ArmSummary
from racdeploy.results.report import Report
from racdeploy.tensors.safetensors import write_header

Json = dict[str, Any]
TABLES = tomllib.loads(Path(__file__).with_name("models.toml").read_text(encoding="utf-8"))
SHAPES = {name: TABLES["shared"] | table for name, table in TABLES.items() if "hub" in table}
PROMPTS = {"gsm8k": 1319, "math500": 500}
TRACE_PROMPTS = 256
ROWS = {
    "50 %": ("--sparsity", "0.5", "--quant", "q8_0"),
    "2:4": ("--pattern", "2:4", "--quant", "q8_0"),
    "cut 3/4": ("--keep", "ffn=0.75", "--quant", "q4_k"),
}
COLUMNS = {"prompt only": ("--calibration", "prompt"), "RAC": ()}
CELLS: dict[str, tuple[str, ...]] = {
    f"{row} {column}": (*of_row, *of_column)
    for row, of_row in ROWS.items()
    for column, of_column in COLUMNS.items()
} | {"default": ()}
CORES = (2, 8, 16)
GPU_SPEED_UP = 500
"""Of a large card over two cores: about 150 against 0.3 TFLOP/s that products reach."""


def main() -> None:
    """Plan, or build what is not there yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(SHAPES))
    parser.add_argument("--model", help="local folder; by default the model's Hub id")
    parser.add_argument("--task", choices=list(PROMPTS), default="math500")
    parser.add_argument("--prompts", type=int, help="default: all of the task")
    parser.add_argument("--cells", nargs="*", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--dry-run", action="store_true", help="print hours, memory and disk")
    parser.add_argument("--out", type=Path, default=Path("build/reproduce"))
    parser.add_argument(
        "--launcher", default="", help='as "torchrun --nproc-per-node 4 -m", for several processes'
    )
    parser.add_argument("--options", default="", help="more options of racdeploy build")
    arguments = parser.parse_args()
    if arguments.dry_run:
        print(plan_table(arguments))
        return

    for cell in arguments.cells:
        build_cell(cell, arguments)
        (arguments.out / "table.md").write_text(write_table(arguments), encoding="utf-8")
    print(write_table(arguments))


def build_cell(cell: str, arguments: argparse.Namespace) -> None:
    """Build a cell unless its bundle is there; a failed verification is a result too."""
    bundle = bundle_of(cell, arguments)
    if (bundle / "report.json").is_file():
        return

    launcher = shlex.split(arguments.launcher) or [sys.executable, "-m"]
    model = arguments.model or SHAPES[arguments.name]["hub"]
    options = list_options(cell, model, f"hub:{arguments.task}", arguments)
    command = [*launcher, "racdeploy", "build", *options]
    print(f"{cell}: {shlex.join(command)}", flush=True)
    code = subprocess.run([*command, *shlex.split(arguments.options)]).returncode
    if code not in (0, 1, 3):  # passed, failed, inconclusive
        raise SystemExit(code)


def list_options(cell: str, model: str, task: str, arguments: argparse.Namespace) -> list[str]:
    """Return what follows ``racdeploy build``."""
    prompts = arguments.prompts or PROMPTS[arguments.task]
    return [
        model,
        *("--tasks", task, "--trace-prompts", str(TRACE_PROMPTS), "--prompts", str(prompts)),
        *("--more-targets", "onnx", "--work", str(arguments.out / "work")),
        *("--out", str(bundle_of(cell, arguments))),
        *CELLS[cell],
    ]


def bundle_of(cell: str, arguments: argparse.Namespace) -> Path:
    """Return the folder of a cell's bundle."""
    words = cell.replace("%", "percent").replace(":", "-of-").replace("/", "-of-").split()
    out: Path = arguments.out
    return out / "-".join([arguments.task, *words])


def write_table(arguments: argparse.Namespace) -> str:
    """Return Markdown: accuracy and thinking of each finished cell beside what is published."""
    published = TABLES["published"].get(arguments.name, {}).get(arguments.task, {})
    rows = [("", "MB", "right", "drop, points", "thinking tokens", "length", "published")]
    for cell in arguments.cells:
        file = bundle_of(cell, arguments) / "report.json"
        if not file.is_file():
            continue

        report = Report.model_validate_json(file.read_bytes())
        if len(rows) == 1:
            rows.append(list_figures("dense", report.dense_arm, report, published))
        for arm in report.arms:
            if arm.name != "dense":
                name = cell if arm.name == "pruned" else f"{cell}, {arm.name}"
                rows.append(list_figures(name, arm, report, published))

    return f"{arguments.name}, {arguments.task}\n\n{draw(rows)}"


def list_figures(
    name: str, arm: ArmSummary, report: Report, published: Json
) -> tuple[str, str, str, str, str, str, str]:
    """Return the cells of a row; only the pruned arm is compared with the dense one."""
    drop = length = ""
    compared = report.comparison
    if compared and arm.name == "pruned":
        drop = (
            f"{100 * compared.drop:.1f}"
            f" ({100 * compared.drop_lower:.1f} to {100 * compared.drop_upper:.1f})"
        )
        if compared.length_ratio:
            length = (
                f"{compared.length_ratio:.3f}"
                f" ({compared.length_lower:.3f} to {compared.length_upper:.3f})"
            )
    return (
        name,
        f"{(arm.size_bytes or 0) / 1e6:,.0f}",
        f"{arm.accuracy:.1%} of {arm.prompts}",
        drop,
        f"{arm.thinking_tokens_mean or 0:,.0f}",
        length,
        f"{published[name]:.1%}" if name in published else "",
    )


def plan_table(arguments: argparse.Namespace) -> str:
    """Return Markdown: hours, memory and disk of each cell, as ``racdeploy build`` plans them.

    Without the weights, zeros of the same shapes stand in for them; word problems stand in for the
    task, with its number of prompts and the thinking length that is published for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or folder
        if not arguments.model:
            write_shapes(Path(folder), SHAPES[arguments.name])
        plans = {cell: plan_cell(cell, model, arguments) for cell in arguments.cells}

    first = next(iter(plans.values()))
    rows = [
        ("step", *(f"hours, {cores} cores" for cores in CORES), "GPU, hours", "GiB", "disk, GB"),
        list_costs("traces, once", first, ("trace",)),
        *(list_costs(cell, plan, ("recover", "prune", "verify")) for cell, plan in plans.items()),
    ]
    notes = (
        "All hours are estimates: those of cores from this machine's speed, those of a GPU from a"
        f" speed {GPU_SPEED_UP} times that of two cores. Dense answers are counted in every cell"
        " and computed once."
    )
    return f"{arguments.name}, {arguments.task}\n\n{draw(rows)}\n{notes}"


def plan_cell(cell: str, model: str, arguments: argparse.Namespace) -> Json:
    """Return what ``racdeploy build --dry-run --json`` prints."""
    # Before there are traces, a plan counts two thirds of their maximum length: the mean.
    tokens = plugins.load("tasks", arguments.task).DATASET.thinking_tokens * 3 // 2
    settings = f"traces.max_new_tokens={tokens} verify.max_new_tokens={tokens}"
    settings += f" verify.context_tokens={tokens + 512} calibration.keep_truncated=true"
    command = [sys.executable, "-m", "racdeploy", "build", "--dry-run", "--json"]
    command += list_options(cell, model, "word_problem", arguments)
    for setting in settings.split():
        command += ["--set", setting]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    planned: Json = json.loads(done.stdout)
    if done.returncode:
        print(f"error: {planned['error']}\n  → {planned['remedy']}", file=sys.stderr)
        raise SystemExit(done.returncode)
    return planned


def list_costs(step: str, plan: Json, stages: tuple[str, ...]) -> tuple[str, ...]:
    """Return the cells of a row of the plan."""
    seconds = sum(plan["stage_seconds"].get(stage, 0.0) for stage in stages)
    peaks = [plan[key] for key in plan if "_memory_bytes" in key and key.split("_")[0] in stages]
    hours = [seconds * available_cores() / cores / 3600 for cores in CORES]
    return (
        step,
        *(f"{number:.1f}" for number in hours),
        f"{hours[0] / GPU_SPEED_UP:.2f}",
        f"{max(peaks, default=0) / 2**30:.1f}",
        f"{plan['disk_bytes'] / 1e9:.0f}",
    )


def write_shapes(folder: Path, config: Json) -> None:
    """Write a model of zeros, which take no space on disk, with the embedded model's tokenizer."""
    shapes = list_tensors(config)
    with (folder / "model.safetensors").open("wb") as file:
        write_header(file, {name: ("BF16", shape) for name, shape in shapes.items()})
        file.truncate(file.tell() + 2 * sum(int(np.prod(shape)) for shape in shapes.values()))

    source = Path(resolve_model("tiny-reasoner").folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    end = json.loads((source / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))


def list_tensors(config: Json) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stored tensor; an embedding that is also the output is one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tied = "lm_head.weight" if config["tie_word_embeddings"] else ""
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name != tied}


def draw(rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown; the first row has its columns."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

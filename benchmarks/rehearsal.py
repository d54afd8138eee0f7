"""Build a model of random weights, at the shapes of a published one, as its first user would.

    python -m benchmarks.rehearsal qwen3-0.6b --out build/rehearsal
    python -m benchmarks.rehearsal qwen3-0.6b --out build/rehearsal --kill

A stand-in for a server thinks 2,000 to 8,000 tokens for each trace; everything else is the product:
cut, codes, GGUF and ONNX, their checks, a verification with few prompts, and the bundle. Writes
seconds, peak memory and disk of each stage, and the plan's forecast, to rehearsal.md. With
``--kill``, a second build in a work folder of its own is killed once in every stage, with signal 9,
and its files are compared with the first one's.

Random weights answer nothing right, so the verdict says nothing; its time and memory do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

import racdeploy
from racdeploy.files.writing import write_atomic
from racdeploy.models.sources import resolve_model
from racdeploy.results.plan import Plan
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tensors.safetensors import write_header
from tests.support.completion_server import Json, agreeing, completed, serving

VOCABULARY = 151_936
_EXAMPLE = Path(__file__).parents[1] / "examples" / "reproduce" / "reproduce.py"
_REPRODUCE = runpy.run_path(str(_EXAMPLE))
SHAPES, list_tensors = _REPRODUCE["SHAPES"], _REPRODUCE["list_tensors"]
THOUGHT_TOKENS = (2_000, 8_000)


@dataclass
class StageFigures:
    """One stage, over all processes of the build."""

    seconds: float = 0.0
    main_mib: float = 0.0
    children_mib: float = 0.0
    disk_mb: float = 0.0


@dataclass
class Watched:
    """A build in a process of its own, until it ended or was killed."""

    finished: bool = False
    killed_in: str = ""
    stages: dict[str, StageFigures] = field(default_factory=dict)
    seconds: float = 0.0


def main() -> None:
    """Build, with and without kills, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--traces", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--blocks", type=int, help="fewer than the published model has")
    parser.add_argument("--kill", action="store_true", help="build again, killed in every stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--options", help=argparse.SUPPRESS)  # of the building process
    arguments = parser.parse_args()

    if arguments.options:
        build(json.loads(arguments.options))
        return

    out: Path = arguments.out
    model = out / arguments.shape
    if not (model / "config.json").is_file():
        fewer = {"num_hidden_layers": arguments.blocks} if arguments.blocks else {}
        write_model(model, SHAPES[arguments.shape] | fewer)

    encoder = PromptEncoder.from_folder(model)
    with serving(agreeing(encoder) | {"v1/completions": think(encoder)}) as server:
        options = list_options(arguments, model, server)
        if not arguments.kill:
            rehearse(options, out, arguments)
        else:
            kill_in_every_stage(options, out, arguments)


def list_options(arguments: argparse.Namespace, model: Path, server: str) -> Json:
    """Return model, threads and settings of the build."""
    return {
        "model": str(model),
        "threads": arguments.threads,
        "settings": {
            "also": ["onnx"],
            "tasks": ["word_problem"],
            "structure.keep": {"ffn": 0.75},
            "export.quant": "q4_k",
            "traces.count": arguments.traces,
            "traces.server": server,
            "verify.count": arguments.prompts,
            "traces.max_new_tokens": THOUGHT_TOKENS[1] + 64,
            "traces.server_model": "tiny",
            "calibration.held_out_share": 1 / arguments.traces,
            "verify.max_new_tokens": 128,
            "verify.context_tokens": 1024,
            "verify.parallel": 2,
            "verify.logit_traces": 1,
        },
    }


def rehearse(options: Json, out: Path, arguments: argparse.Namespace) -> None:
    """Build without a break; write the table."""
    work, bundle = out / "work", out / "bundle"
    keywords = options | {"work": str(work), "out": str(bundle)}
    planned = plan(keywords)
    assert planned.time
    forecast_s = planned.time.seconds_expected
    print(f"planned: {forecast_s} s", flush=True)
    watched = watch(keywords, out, arguments.shape)
    assert watched.finished, "the build ended with an error: see build.log"

    result = {
        "shape": arguments.shape,
        "forecast_s": forecast_s,
        "seconds": watched.seconds,
        "model_mb": folder_bytes(Path(options["model"])) / 1e6,
        "work_mb": folder_bytes(work) / 1e6,
        "bundle_mb": folder_bytes(bundle) / 1e6,
        "stages": {label: asdict(figures) for label, figures in watched.stages.items()},
        "sha256": hash_weights(bundle),
    }
    (out / "rehearsal.json").write_text(json.dumps(result, indent=1))
    (out / "rehearsal.md").write_text(write_table(result), encoding="utf-8")
    print((out / "rehearsal.md").read_text(encoding="utf-8"))


def kill_in_every_stage(options: Json, out: Path, arguments: argparse.Namespace) -> None:
    """Build again, killed once in each stage of the first build; compare the files."""
    first = json.loads((out / "rehearsal.json").read_text())
    work, bundle = out / "killed" / "work", out / "killed" / "bundle"
    keywords = options | {"work": str(work), "out": str(bundle)}

    left = set(first["stages"])
    seconds, killed = 0.0, []
    while True:
        watched = watch(keywords, out, arguments.shape, left)
        seconds += watched.seconds
        if watched.finished:
            break
        assert watched.killed_in, "the build ended with an error: see build.log"
        killed.append(watched.killed_in)
        left.discard(watched.killed_in)

    same = hash_weights(bundle) == first["sha256"]
    text = (
        f"\nKilled in {', '.join(killed)}: {seconds:.0f} s in all ({first['seconds']:.0f} s without"
        f" kills), files {'are the same' if same else 'DIFFER'}.\n"
    )
    with (out / "rehearsal.md").open("a", encoding="utf-8") as file:
        file.write(text)
    print(text)


def build(options: Json) -> None:
    """Build in this process; print a line for each step of the progress."""

    def report(label: str, done: int, total: int, *_: object) -> None:
        print(json.dumps([label, done, total]), flush=True)

    recipe = racdeploy.Recipe.read(settings=options["settings"])
    bundle = racdeploy.build(
        options["model"],
        recipe=recipe,
        out=options["out"],
        work=options["work"],
        threads=options["threads"],
        progress=report,
    )
    print(json.dumps(["end", str(bundle.folder), 0]), flush=True)


def plan(keywords: Json) -> Plan:
    """Return the plan of ``racdeploy build --dry-run``."""
    from racdeploy.api.builds import plan_build
    from racdeploy.api.options import BuildOptions

    options = BuildOptions(
        model=keywords["model"],
        settings=keywords["settings"],
        out=Path(keywords["out"]),
        work=Path(keywords["work"]),
        threads=keywords["threads"],
    )
    return plan_build(options)


def watch(keywords: Json, out: Path, shape: str, kill_in: set[str] | None = None) -> Watched:
    """Run a build in a process of its own; kill it in the first stage of ``kill_in``.

    Without kills, figures are those of all runs in this folder: a long build goes on another day.
    """
    command = [sys.executable, "-m", "benchmarks.rehearsal", shape, "--out", str(out)]
    began_s = last_s = time.monotonic()
    watched, label, lock = Watched(), "start", threading.Lock()
    earlier = out / "stages.json"
    if kill_in is None and earlier.is_file():
        stored = json.loads(earlier.read_text())
        watched.stages = {name: StageFigures(**figures) for name, figures in stored.items()}

    with (out / "build.log").open("a") as log:
        process = subprocess.Popen(
            [*command, "--options", json.dumps(keywords)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            main_mib, children_mib = read_memory(process.pid)
            with lock:
                figures = watched.stages.setdefault(label, StageFigures())
                figures.main_mib = max(figures.main_mib, main_mib)
                figures.children_mib = max(figures.children_mib, children_mib)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stdout
    for line in process.stdout:
        name, done, total = json.loads(line)
        now_s = time.monotonic()
        with lock:
            figures = watched.stages.setdefault(label, StageFigures())
            figures.seconds += now_s - last_s
        if name != label:
            figures.disk_mb = folder_bytes(Path(keywords["work"])) / 1e6
            print(f"{now_s - began_s:.0f} s: {label} ended, {figures}", flush=True)
        if kill_in is None:
            with lock:
                stored = {name: asdict(each) for name, each in watched.stages.items()}
            write_atomic(earlier, json.dumps(stored))
        last_s, label = now_s, name
        watched.finished = watched.finished or name == "end"
        if kill_in and name in kill_in and (done > 0 or total <= 1):
            os.killpg(process.pid, signal.SIGKILL)
            watched.killed_in = name
            break

    process.wait()
    ended.set()
    sampler.join()
    watched.stages.pop("end", None)
    watched.seconds = sum(each.seconds for each in watched.stages.values())
    return watched


def read_memory(pid: int) -> tuple[float, float]:
    """Return MiB in memory of a process, and of all its descendants together."""
    own_mib = children_mib = 0.0
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (folder / "children").read_text().split()
        except OSError:  # it has ended
            continue
        children_mib += sum(map(sum, map(read_memory, map(int, children))))

    try:
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, children_mib
    for row in rows:
        if row.startswith("VmRSS"):
            own_mib = int(row.split()[1]) / 1024
    return own_mib, children_mib


def think(encoder: PromptEncoder) -> Any:
    """Return the completions of a model that thinks long, some words more often than others."""
    tags = find_tags(encoder)
    assert tags
    close = list(tags.close_ids)
    (end,) = encoder.tokenizer.tokens_to_ids(["<|im_end|>"])
    assert end
    answer = encoder.encode_text("The answer is \\boxed{42}.")

    def complete(body: Json) -> Json:
        draw = random.Random(json.dumps(body["prompt"]))
        length = draw.randint(*THOUGHT_TOKENS)
        words = [int(draw.paretovariate(0.7)) % (end - 1) for _ in range(length)]
        return completed(body["prompt"], (*words, *close, *answer, end), "stop")

    return complete


def write_model(folder: Path, config: Json) -> None:
    """Write random bfloat16 weights, one tensor in memory at a time, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    shapes = list_tensors(config)
    numbers = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        write_header(file, {name: ("BF16", shape) for name, shape in shapes.items()})
        for name, shape in shapes.items():
            values = np.ones(shape, np.float32)
            if "norm" not in name:
                values = numbers.standard_normal(shape, np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())

    end = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|im_end|>")
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE of the vocabulary's size, on the Python files of this environment.

    Its split is Qwen's, which llama.cpp knows; template and special tokens are those of the
    embedded model.
    """
    source = Path(resolve_model("tiny-reasoner").folder)
    template = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    embedded = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    special = [token["content"] for token in embedded["added_tokens"]]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_find_split(embedded), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 256,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_list_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template["model_max_length"] = 131_072
    (folder / "tokenizer_config.json").write_text(json.dumps(template), encoding="utf-8")


def _find_split(tokenizer: Json) -> Any:
    parts = tokenizer["pre_tokenizer"].get("pretokenizers", [tokenizer["pre_tokenizer"]])
    (pattern,) = (part["pattern"]["Regex"] for part in parts if part["type"] == "Split")
    return Regex(pattern)


def _list_texts(most: int = 6_000) -> Iterator[str]:
    files = sorted(Path(np.__file__).parents[1].rglob("*.py"))
    for file in chain(files[:most]):
        yield file.read_text(encoding="utf-8", errors="replace")


def hash_weights(bundle: Path) -> dict[str, str]:
    """Return the SHA-256 of each file with weights."""
    suffixes = {".gguf", ".onnx", ".onnx_data"}
    hashes = {}
    for file in sorted(bundle.rglob("*")):
        if file.suffix in suffixes:
            with file.open("rb") as opened:
                hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def folder_bytes(folder: Path) -> int:
    """Return the bytes on disk of a folder's files, each file once."""
    files: dict[tuple[int, int], int] = {}
    for file in folder.rglob("*"):
        try:
            status = file.lstat()
        except OSError:  # renamed meanwhile
            continue
        files[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(files.values())


def write_table(result: Json) -> str:
    """Return Markdown: a line for each stage, then the sums."""
    lines = [
        f"{result['shape']}, random weights, {result['model_mb']:,.0f} MB",
        "",
        "| stage | seconds | peak, MiB | engines, MiB | work folder after it, MB |",
        "|---|---|---|---|---|",
    ]
    for label, row in result["stages"].items():
        lines.append(
            f"| {label} | {row['seconds']:.0f} | {row['main_mib']:,.0f} |"
            f" {row['children_mib']:,.0f} | {row['disk_mb']:,.0f} |"
        )
    forecast = result["forecast_s"] or 0.0
    lines += [
        "",
        f"In all {result['seconds']:.0f} s, forecast {forecast:.0f} s"
        f" ({result['seconds'] / max(forecast, 1):.2f} ×); disk: work {result['work_mb']:,.0f} MB"
        f" and bundle {result['bundle_mb']:,.0f} MB,"
        f" {(result['work_mb'] + result['bundle_mb']) / result['model_mb']:.2f} × the model.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

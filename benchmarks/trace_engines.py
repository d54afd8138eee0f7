"""Compare the engines that can make traces: tokens a second, memory, and distance from torch.

    python -m benchmarks.trace_engines MODEL --task gym:gsm_symbolic --count 16 --out folder

Every engine answers the same prompts in a process of its own, one after the other, with the
settings of the recipe's ``traces``. KL and equal top tokens are those of the file from torch, on
the first answers that torch gave.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy import exporting, tasks
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import resolve_model
from racdeploy.recipe import Export, Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.top_logits import compare_top, take_top

FILES = ("bf16", "q8_0")
COMPARED = 4  # answers


def main() -> None:
    """Measure every engine and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task", default="multiplication")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", help="of the process that measures one")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.engine:
        print(json.dumps(_measure(arguments)))
        return

    rows = []
    for name in ("transformers", *FILES):
        command = [sys.executable, "-m", "benchmarks.trace_engines", *sys.argv[1:]]
        done = subprocess.run(
            [*command, "--engine", name], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))

    print("| engine | tokens/s | peak memory | KL from torch | equal top tokens |")
    print("|---|---|---|---|---|")
    for row in rows:
        distance = "| |"
        if "kl" in row:
            distance = f"| {row['kl']:.1e} | {row['same']:.1%} |"
        print(f"| {row['engine']} | {row['rate']:.1f} | {row['gib']:.2f} GiB {distance}")


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer the prompts with one engine; compare a file with what torch said before."""
    folder = resolve_model(arguments.model).folder
    encoder = PromptEncoder.from_folder(folder)
    task = tasks.load(arguments.task)
    problems = task.draw_problems("calibration", 0, arguments.count)
    prompts = [encoder.encode(problem.question) for problem in problems]

    traces = Traces()
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        stop_ids=Checkpoint(folder).eos_ids,
        temperature=traces.temperature,
        top_p=traces.top_p,
    )
    context_tokens = max(map(len, prompts)) + arguments.max_new_tokens + 1
    settings = EngineSettings(context_tokens, arguments.parallel, arguments.threads)
    torch_file = arguments.out / "torch.json"
    is_torch = arguments.engine == "transformers"

    model = folder if is_torch else _export(folder, arguments)
    backend = "transformers" if is_torch else "llamacpp"
    with open_engine(backend, model, settings) as engine:
        started = time.perf_counter()
        answers = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - started

        row = {
            "engine": arguments.engine,
            "rate": sum(len(answer.ids) for answer in answers) / seconds,
            "ended": sum(answer.finish_reason == "stop" for answer in answers),
        }
        if is_torch:
            asked = zip(prompts, answers, strict=True)
            chosen = [[*prompt, *answer.ids] for prompt, answer in list(asked)[:COMPARED]]

    peaks = [resource.getrusage(who).ru_maxrss for who in (0, resource.RUSAGE_CHILDREN)]
    row["gib"] = sum(peaks) / 2**20
    if is_torch:
        torch_file.write_text(json.dumps(chosen))
    else:
        row |= _compare(folder, model, settings, json.loads(torch_file.read_text()))
    return row


def _export(folder: Path, arguments: argparse.Namespace) -> Path:
    path: Path = arguments.out / f"{arguments.engine}.gguf"
    if not path.is_file():
        exporting.write(Checkpoint(folder), path, Export(quant=arguments.engine))
    return path


def _compare(
    folder: Path, file: Path, settings: EngineSettings, sequences: list[list[int]]
) -> dict[str, float]:
    """Return mean KL and equal top tokens of a file from torch, over whole sequences."""
    with open_engine("transformers", folder, settings) as engine:
        expected = [take_top(engine.logits(ids)) for ids in sequences]
    with open_engine("llamacpp", file, settings) as engine:
        compared = []
        for top, ids in zip(expected, sequences, strict=True):
            compared.append(compare_top(top, engine.logits(ids)))

    kl_T, same_T = (np.concatenate([each[part] for each in compared]) for part in (0, 1))
    return {"kl": float(kl_T.mean()), "same": float(same_T.mean())}


if __name__ == "__main__":
    main()

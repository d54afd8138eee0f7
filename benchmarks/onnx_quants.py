r"""Which number format of ONNX is worth its bits? KL on a model's own traces, size and speed.

    python -m benchmarks.onnx_quants --out build/onnx-quants
    python -m benchmarks.onnx_quants --out build/onnx-quants-smollm2 --model FOLDER \
        --task jsonl:FILE --traces 48

Prunes a model, exports it in every number format, and compares each file with the pruned checkpoint
under torch, teacher-forced on held-out traces that the dense model wrote, prompt left out. Decoding
is one sequence on one thread, medians of alternating rounds.
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from statistics import median

from benchmarks._setup import Trace, prune, pruning_parser
from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.engines import open_engine
from racdeploy.engines.backends import onnxruntime
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import ExportResult
from racdeploy.exporting import onnx as onnx_format
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.verification.top_logits import compare_checkpoints

NEW_TOKENS = 128


def main() -> None:
    """Prune, export, compare, time, and print a table."""
    parser = pruning_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    _, folder, traces = prune(arguments)
    checkpoint = Checkpoint(folder)
    names = [name for name in plugins.list_names("quant") if "onnx" in quants.load(name).formats]
    names.sort(key=lambda name: -quants.load(name).bits)
    exports = {name: export(checkpoint, arguments.out / name, name) for name in names}
    compared = {
        name: compare(checkpoint.folder, result.path, traces) for name, result in exports.items()
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, result in exports.items():
            times[name].append(token_ms(result.path, traces[0][0]))
    print(
        "| quant | bits a weight of a linear | file MB | KL | top-1 | ms a token "
        "| tokens compared |"
    )
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name, result in exports.items():
        linears = [
            tensor
            for tensor in result.tensors
            if tensor.actual_quant == name and len(tensor.shape) == 2
        ]
        bits = (
            8
            * sum(tensor.size_bytes for tensor in linears)
            / sum(math.prod(tensor.shape) for tensor in linears)
        )
        size_mb, token = result.size_bytes / 1e6, median(times[name])
        kl, top1, tokens = compared[name]
        rows.append(
            {"quant": name, "kl": kl, "top1": top1, "tokens": tokens, "token_ms": times[name]}
        )
        print(
            f"| {name} | {bits:g} | {size_mb:.2f} | {kl:.2e} | {top1:.2%} | {token:.2f} "
            f"| {tokens} |"
        )
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def export(checkpoint: Checkpoint, folder: Path, name: str) -> ExportResult:
    """Export the pruned model in one number format."""
    folder.mkdir(parents=True, exist_ok=True)
    return onnx_format.export(checkpoint, folder / "model.onnx", quant=name)


def compare(folder: Path, file: Path, traces: list[Trace]) -> tuple[float, float, int]:
    """Return mean KL and top-1 of a file from its checkpoint under torch, and the tokens."""
    exact = EngineSettings(2048, 1, 1, "f32")
    found = compare_checkpoints(
        lambda: closing(open_engine("transformers", folder, exact)),
        lambda: closing(open_engine("transformers", folder, exact)),
        lambda: closing(open_engine("onnxruntime", file, exact)),
        traces,
    )
    assert found
    return found.export.kl, found.export.top1, found.tokens


def token_ms(file: Path, prompt: tuple[int, ...]) -> float:
    """Return milliseconds a token, in a fresh process that has decoded a few before."""
    with closing(onnxruntime.open_engine(file, EngineSettings(2048, 1, 1))) as engine:
        engine.generate([prompt[:8]], Sampling(2, stop_ids=()))
        before = engine.stats["decode_s"]
        engine.generate([prompt], Sampling(NEW_TOKENS, stop_ids=()))
        return 1000 * (engine.stats["decode_s"] - before) / (NEW_TOKENS - 1)


if __name__ == "__main__":
    main()

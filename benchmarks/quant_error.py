"""How much less does a number format lose when its scales are chosen for the weights that matter?

    python -m benchmarks.quant_error --out build/quant-error

Prunes a model, and quantizes it with ggml's scales and with those that the pruning's own statistic
chooses. Prints for each number format the weighted squared error of the linears, chosen over
ggml's, and the KL of the exported file from the pruned checkpoint, teacher-forced on held-out
traces: torch against llama.cpp, with an interval of the difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks._setup import Trace, prune, pruning_parser
from racdeploy import plugins, quant
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.quant.importance import Importance
from racdeploy.verification.top_logits import compare_top, completion_logits, take_top

QUANTS = ("q8_0", "q6_k", "q5_0", "q4_0", "mxfp4", "q3_k", "sparse_q4", "q4_k_m", "iq4_nl")


def main() -> None:
    """Prune, quantize both ways and print a table."""
    parser = pruning_parser(__doc__)
    parser.add_argument("--quants", nargs="+", default=QUANTS)
    arguments = parser.parse_args()
    build, folder, traces = prune(arguments)
    with open_engine(
        "transformers", folder, EngineSettings(2048, 1, arguments.threads, "f32")
    ) as engine:
        references = [completion_logits(engine, trace) for trace in traces]
    tokens, rows = sum(map(len, references)), []
    print(
        f"{tokens} tokens of {len(traces)} traces; difference: chosen less ggml, 95 % over traces"
    )
    print(
        "| quant | bits | weighted error, chosen / ggml | KL ggml | KL chosen | difference "
        "| top-1 ggml | chosen |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.quants:
        kls: dict[str, list[NDArray[np.float64]]] = {}
        row = {
            "quant": name,
            "ratio": ratio(folder, name) if name in plugins.list_names("quant") else None,
        }
        for arm, importance in (("ggml", "none"), ("chosen", "")):
            file = arguments.out / f"{arm}.gguf"
            result = gguf.export(Checkpoint(folder), file, quant=name, importance=importance)
            kls[arm], row[f"top1_{arm}"] = measure(references, file, traces, arguments.threads)
            row[f"kl_{arm}"] = float(np.concatenate(kls[arm]).mean())
        linears = [t for t in result.tensors if t.source in build.job.prunable_weights]
        weights = sum(t.shape[0] * t.shape[1] for t in linears)
        row["bits"] = 8 * sum(t.size_bytes for t in linears) / weights
        row["zeros"] = sum(t.zeros * t.shape[0] * t.shape[1] for t in linears) / weights
        row["difference"] = difference(kls["ggml"], kls["chosen"])
        rows.append(row)
        shown = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(
            f"| {name} | {row['bits']:.2f} | {shown} | {row['kl_ggml']:.2e} "
            f"| {row['kl_chosen']:.2e} |"
            f" {row['difference'][0]:+.1e} to {row['difference'][1]:+.1e} |"
            f" {row['top1_ggml']:.2%} | {row['top1_chosen']:.2%} |",
            flush=True,
        )
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))


def ratio(folder: Path, name: str) -> float | None:
    """Return the weighted squared error of all linears with chosen scales, over that with
    ggml's.
    """
    checkpoint, form = Checkpoint(folder), quant.load(name)
    known = Importance.read(folder / IMPORTANCE_FILE)
    errors = np.zeros(2)
    for source in known.means:
        weight_OI = checkpoint.read(source)
        importance_I = known.for_weight("", source, weight_OI.shape[1])
        if importance_I is None or quant.explain_misfit(form, weight_OI.shape[1]):
            continue
        for index, given in enumerate((importance_I, None)):
            error_OI = (
                form.dequantize(form.quantize(weight_OI, given), weight_OI.shape[1]) - weight_OI
            )
            errors[index] += float((np.square(error_OI, dtype=np.float64) * importance_I).sum())
    return float(errors[0] / errors[1]) if errors[1] else None


def measure(
    references: list[NDArray[np.float32]], file: Path, traces: Sequence[Trace], threads: int
) -> tuple[list[NDArray[np.float64]], float]:
    """Return the KL at every position of each trace, and the share of equal first choices, of a
    file against torch.
    """
    with open_engine("llamacpp", file, EngineSettings(2048, 1, threads, "f32")) as engine:
        found = [
            compare_top(take_top(r), completion_logits(engine, t))
            for r, t in zip(references, traces, strict=True)
        ]
    return [kl_T for kl_T, *_ in found], float(
        np.concatenate([same_T for _, same_T, _ in found]).mean()
    )


def difference(
    ggml: list[NDArray[np.float64]], chosen: list[NDArray[np.float64]]
) -> tuple[float, float]:
    """Return the 95 % interval of the mean KL of chosen scales less that of ggml's, over draws of
    whole traces.
    """
    random, sizes = np.random.default_rng(0), np.array([len(kl_T) for kl_T in ggml])
    sums = np.array([float((b - a).sum()) for a, b in zip(ggml, chosen, strict=True)])
    drawn = random.integers(0, len(sums), (10_000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()

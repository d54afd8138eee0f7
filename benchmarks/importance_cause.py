"""Why does an importance matrix cost a model accuracy that was fine-tuned from rounded weights?

    python -m benchmarks.importance_cause MODEL BASE TRACES --quant q4_0

BASE is the model before fine-tuning, whose weights lie on the grid of some 4-bit format, and TRACES
a folder of MODEL's traces. Prints for nearest rounding, and for ggml's search of scales with the
importance of the traces, which share of the fine-tuning the rounding takes back, and the KL on
completions of held-out traces. Then the same for an equal model whose channels are scaled at
random, which takes its weights off the base's grid and changes no output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.off_levels import load, scale_channels
from racdeploy import quant
from racdeploy.processes.heap import keep_heap
from racdeploy.quant import ggml
from racdeploy.traces.trace import Trace, TraceSet

CALIBRATION, HELD_OUT = 80, 24
_MIN_IMPORTANCE = 1e-4  # of the mean; ggml needs it above 0


def main() -> None:
    """Round the model in both ways, before and after its channels are scaled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--quant", default="q4_0")
    arguments = parser.parse_args()
    keep_heap()

    traces = TraceSet(arguments.traces).read()
    Random(0).shuffle(traces)
    calibration, held_out = traces[:CALIBRATION], traces[CALIBRATION : CALIBRATION + HELD_OUT]
    learned = {
        name: linear.weight - base.weight
        for (name, linear), (_, base) in zip(
            list_linears(load(arguments.model)), list_linears(load(arguments.base)), strict=True
        )
    }

    print(
        "| weights | rounding | taken back of the fine-tuning | KL |\n|---|---|---|---|", flush=True
    )
    for label in ("as they are", "channels scaled at random"):
        model = load(arguments.model)
        if label != "as they are":
            scale_channels(model)
            learned = {}
        importance = measure_importance(model, calibration)
        reference = [log_softmax(model, trace) for trace in held_out]

        exact = {name: linear.weight.detach().clone() for name, linear in list_linears(model)}
        for rounding in ("nearest", "with importance"):
            taken, energy = 0.0, 0.0
            for name, linear in list_linears(model):
                matrix = importance[name] if rounding == "with importance" else None
                linear.weight.data = round_weight(exact[name], arguments.quant, matrix)
                if name in learned:
                    error, change = linear.weight - exact[name], learned[name]
                    taken -= (error * change).sum().item()
                    energy += change.square().sum().item()
            kl = measure_kl(model, held_out, reference)
            share = f"{taken / energy:.1%}" if energy else ""
            print(f"| {label} | {rounding} | {share} | {kl:.1e} |", flush=True)


def list_linears(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield the linears of all blocks by name."""
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield name, module


@torch.no_grad()
def measure_importance(model: Any, traces: Sequence[Trace]) -> dict[str, torch.Tensor]:
    """Return the mean squared input of each linear, over its mean."""
    sums: dict[str, torch.Tensor] = {}
    handles = []
    for name, linear in list_linears(model):

        def add(_: Any, inputs: Any, __: Any, name: str = name) -> None:
            sums[name] = sums.get(name, 0) + inputs[0][0].double().square().sum(0)

        handles.append(linear.register_forward_hook(add))
    for trace in traces:
        model(torch.tensor([trace.ids]))
    for handle in handles:
        handle.remove()
    return {name: (total / total.mean()).float() for name, total in sums.items()}


def round_weight(
    weight_OI: torch.Tensor, name: str, importance_I: torch.Tensor | None
) -> torch.Tensor:
    """Return the weights as ggml rounds them."""
    matrix = None if importance_I is None else importance_I.clamp(_MIN_IMPORTANCE).numpy()
    packed_OP = ggml.quantize(quant.load_ggml(name).type_id, weight_OI.numpy(), matrix)
    return torch.from_numpy(np.array(quant.load(name).dequantize(packed_OP, weight_OI.shape[1])))


@torch.no_grad()
def log_softmax(model: Any, trace: Trace) -> torch.Tensor:
    """Return the next-token distributions on the completion."""
    logits_TV: torch.Tensor = model(torch.tensor([trace.ids])).logits[0]
    return logits_TV[len(trace.prompt_ids) - 1 : -1].log_softmax(-1)


def measure_kl(model: Any, traces: Sequence[Trace], reference: Sequence[torch.Tensor]) -> float:
    """Return the mean KL from the exact model, in nats a token."""
    parts = []
    for trace, log_p_TV in zip(traces, reference, strict=True):
        log_q_TV = log_softmax(model, trace)
        parts.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1))
    return float(torch.cat(parts).double().mean())


if __name__ == "__main__":
    main()

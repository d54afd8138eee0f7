r"""Is optimized rounding better with a chosen embedding, learned scales, or mixed formats?

    python -m benchmarks.rounding_variants --out build/rounding-variants --quants q3_k q4_k

Each variant alone, beside the product's codes at the same bytes: KL as in benchmarks.quantizers,
with its ratio to the product's, and processor seconds beside those of choosing the codes.
``embedding`` chooses the codes of a tied embedding on the last hidden states, for the dense logits,
beside rounding it to nearest; ``scales`` learns scales, minima and norms by the KL divergence after
all codes; ``states`` does so by the error of the last hidden states; ``mixed`` gives each linear
one of three or four formats, by the error of the last hidden states when it alone is rounded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from benchmarks._quantizing import Logits, Row, list_linears, torch_logits
from benchmarks.quantizers import Benchmark, interval_of_ratio, read_linears
from racdeploy import quant as quants
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.files.caches import default_work_folder
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.rounding import round_to_grid
from racdeploy.quant.stored_codes import CodedWeight
from racdeploy.traces.trace import Trace

FORMATS = {
    "q3_k": ("q2_k", "q3_k", "q4_k", "q5_k"),
    "q4_k": ("q3_k", "q4_k", "q5_k", "q6_k"),
    "q4_0": ("q3_k", "q4_0", "q5_0", "q6_k"),
}
"""Formats that a mix of the bytes of one format may use."""
VARIANTS = ("embedding", "scales", "states", "mixed")
RATE, BATCH = 1e-3, 8
"""Learning rate of factors about 1, and traces of a step; one pass over the traces."""
SAMPLE = 8
"""Traces on which the error of a rounded linear is measured."""
EMBEDDING_DAMPING = 0.1
"""Of the last hidden states' Hessian: less moves the input of the first block too far."""


def main() -> None:
    """Measure every cell and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--quants", nargs="*", default=["q3_k", "q4_k"], choices=list(FORMATS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], help="split of the traces")
    parser.add_argument("--traces", type=int, default=192, help="that calibrate")
    parser.add_argument("--held-out", type=int, default=256, help="more traces, and rows of text")
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(tasks=[], max_new_tokens=1024, text=None, prompts=0, cut_blocks=0)
    parser.set_defaults(autoround_iterations=0, threads=1, set=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    for seed in arguments.seeds:
        for quant in arguments.quants:
            measure(arguments, seed, quant)


def measure(arguments: argparse.Namespace, seed: int, quant: str) -> None:
    """Print the line of each variant of a cell."""
    bench = open_bench(arguments, arguments.out, ())
    row = bench.measure(seed, quant, "ours")
    calibration, _ = bench.split(seed)
    print(f"{quant}, seed {seed}: {describe(row, row)}, {row['cpu_s']:.1f} s", flush=True)

    for variant in arguments.variants:
        began = time.process_time()
        beside = row
        if variant == "embedding":
            embedding = choose_embedding(bench, row, calibration, quant)
            seconds = time.process_time() - began
            beside, changed = (bench.compare(seed, each) for each in embedding)
        elif variant == "mixed":
            tensors = choose_formats(bench, calibration[:SAMPLE], quant)
            seconds = time.process_time() - began
            mixed = open_bench(arguments, arguments.out / "mixed", tensors)
            changed = mixed.measure(seed, quant, "ours")
            seconds += changed["cpu_s"] - row["cpu_s"]
        else:
            logits = learn_scales(bench, row, calibration, by_states=variant == "states")
            seconds = time.process_time() - began
            changed = bench.compare(seed, logits)

        print(f"  {variant}: {describe(changed, beside)}, {seconds:.1f} s more", flush=True)


def open_bench(
    arguments: argparse.Namespace, out: Path, tensors: Sequence[tuple[str, str]]
) -> Benchmark:
    """Return the data of a cell, with number formats of single linears."""
    out.mkdir(parents=True, exist_ok=True)
    patterns = ", ".join(f"'^{name}$' = '{quant}'" for name, quant in tensors)
    settings = [f"export.tensors={{{patterns}}}"] if tensors else []
    return Benchmark(argparse.Namespace(**{**vars(arguments), "out": out, "set": settings}))


def describe(row: Row, beside: Row) -> str:
    """Return the KL on both kinds of held-out tokens, and its ratio to another file's."""
    parts = []
    for kind in ("traces", "text"):
        one, other = row[kind], beside[kind]
        ratio, lower, upper = interval_of_ratio(one["sums"], other["sums"])
        median = np.median(np.divide(one["sums"], one["tokens"]))
        median /= np.median(np.divide(other["sums"], other["tokens"]))
        ratios = f"{ratio:.2f} ({lower:.2f} to {upper:.2f}), median {median:.2f}"
        parts.append(f"{kind} {one['kl']:.2e}, {ratios}")
    return "; ".join(parts)


def load_quantized(row: Row) -> torch.nn.Module:
    """Return the model of a file under torch; embedding and norms are exact."""
    checkpoint = Checkpoint(Path(row["model"]))
    model = load_model(checkpoint)
    for name, weight_OI in read_linears(Path(row["file"]), checkpoint):
        model.get_parameter(name).data.copy_(torch.from_numpy(weight_OI))
    return model


def compute_states(model: torch.nn.Module, ids_BT: Tensor) -> Tensor:
    """Return the last hidden states, after the final norm."""
    states_BTD: Tensor = model.get_submodule("model")(input_ids=ids_BT, use_cache=False)[0]
    return states_BTD


@torch.inference_mode()
def choose_embedding(
    bench: Benchmark, row: Row, traces: Sequence[Trace], quant: str
) -> tuple[Logits, Logits]:
    """Return the logits with an embedding rounded to nearest, and with chosen codes."""
    dense, model = load_model(bench.checkpoint), load_quantized(row)
    name = bench.checkpoint.family.embedding
    weight_VD = dense.get_parameter(name).data.float()
    D = weight_VD.shape[1]
    H_DD, delta_DD = torch.zeros(D, D), torch.zeros(D, D)
    for trace in traces:
        ids_1T = torch.tensor([trace.ids])
        states_ND = compute_states(model, ids_1T)[0]
        H_DD += states_ND.T @ states_ND
        delta_DD += (compute_states(dense, ids_1T)[0] - states_ND).T @ states_ND

    # As of a linear: the weights that map the quantized model's states to the dense logits.
    # The damping keeps the rows near the embedding of the first block, too.
    hessian = Hessian(H_DD, EMBEDDING_DAMPING)
    target_VD = weight_VD + hessian.solve(weight_VD @ delta_DD)
    everything = PrunedWeights(target_VD.clone(), torch.ones_like(target_VD, dtype=torch.bool))
    chosen_VD, _ = round_to_grid(everything, target_VD, hessian, quants.load_grid(quant))

    nearest = load_quantized(row)
    nearest.get_parameter(name).data.copy_(round_to_nearest(weight_VD, quant))
    model.get_parameter(name).data.copy_(chosen_VD)
    return torch_logits(nearest), torch_logits(model)


def round_to_nearest(weight_OI: Tensor, quant: str) -> Tensor:
    """Return weights as ggml stores them without importance."""
    form = quants.load_ggml(quant)
    packed_OP = np.ascontiguousarray(form.quantize(weight_OI.numpy()))
    return torch.from_numpy(form.dequantize(packed_OP, weight_OI.shape[1]).copy())


class ScaledLinear:
    """A linear of fixed codes, with factors of its scales and of its minima's to learn."""

    def __init__(self, stored: CodedWeight) -> None:
        grid, codes = quants.load_grid(stored.quant), stored.read_codes()
        groups = grid.block_size // grid.group_size
        step_OX = np.repeat(codes.scale_OX, groups, axis=1)
        if codes.step_code_OG is not None:
            step_OX = step_OX * codes.step_code_OG
        step_OI = np.repeat(step_OX, grid.group_size, axis=1)
        value_OI = np.array(grid.values, np.float32)[codes.code_OI] * step_OI

        self._shape = *codes.scale_OX.shape, grid.block_size
        self._value_OXS = torch.from_numpy(value_OI).float().view(self._shape)
        self._minimum_OXS = self._value_OXS - torch.from_numpy(grid.decode(codes)).view(self._shape)
        self.factors = [torch.ones(*self._shape[:2], 1, requires_grad=True) for _ in range(2)]

    def weight(self) -> Tensor:
        """Return weight_OI."""
        scale_OX1, minimum_OX1 = self.factors
        weight_OXS = self._value_OXS * scale_OX1 - self._minimum_OXS * minimum_OX1
        return weight_OXS.flatten(1)


def learn_scales(bench: Benchmark, row: Row, traces: Sequence[Trace], *, by_states: bool) -> Logits:
    """Return the logits after one pass of Adam over scales, minima and norms; codes stay."""
    dense, model = load_model(bench.checkpoint), load_quantized(row)
    coded = Checkpoint(Path(row["model"])).coded
    linears = {name: ScaledLinear(stored) for name, stored in coded.items()}
    norms = {n: p.detach() for n, p in model.named_parameters() if "norm" in n}
    factors = {name: torch.ones_like(norm, requires_grad=True) for name, norm in norms.items()}
    learned = [*factors.values(), *(each for one in linears.values() for each in one.factors)]
    optimizer = torch.optim.Adam(learned, betas=(0.9, 0.95))
    steps = -(-len(traces) // BATCH)

    def list_weights() -> dict[str, Tensor]:
        weights = {name: linear.weight() for name, linear in linears.items()}
        return weights | {name: norms[name] * factor for name, factor in factors.items()}

    for step, (ids_BT, real_BT) in enumerate(make_batches(traces)):
        warm, falling = (step + 1) / max(steps // 10, 1), (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = RATE * min(warm, 1) * falling

        with torch.no_grad():
            target_ND = compute_states(dense, ids_BT)[real_BT]
        inner = {name.removeprefix("model."): each for name, each in list_weights().items()}
        inputs = {"input_ids": ids_BT, "use_cache": False}
        states_ND = functional_call(model.get_submodule("model"), inner, (), inputs)[0][real_BT]

        if by_states:
            lost_N = (states_ND - target_ND).square().sum(1) / target_ND.square().sum(1)
        else:
            head = dense.get_submodule("lm_head")
            q_NV, p_NV = (head(each).log_softmax(1) for each in (states_ND, target_ND))
            lost_N = (p_NV.exp() * (p_NV - q_NV)).sum(1)

        optimizer.zero_grad()
        lost_N.mean().backward()
        optimizer.step()

    with torch.no_grad():
        for name, weight in list_weights().items():
            model.get_parameter(name).copy_(weight)
    return torch_logits(model)


def make_batches(traces: Sequence[Trace]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and a mask of those that are no padding, of traces of like length."""
    ordered = sorted((trace.ids for trace in traces), key=len)
    groups = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    for index in np.random.default_rng(0).permutation(len(groups)):
        rows = [torch.tensor(ids) for ids in groups[index]]
        real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        yield pad_sequence(rows, batch_first=True), pad_sequence(real, batch_first=True)


@torch.inference_mode()
def choose_formats(bench: Benchmark, traces: Sequence[Trace], quant: str) -> list[tuple[str, str]]:
    """Return the format of each linear by its name in the file: least error at equal bytes."""
    model = load_model(bench.checkpoint)
    ids = [torch.tensor([trace.ids]) for trace in traces]
    dense = [compute_states(model, each) for each in ids]
    errors: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}

    for tensor in list_linears(bench.checkpoint):
        parameter = model.get_parameter(tensor.source)
        kept_OI = parameter.data.clone()
        rounded = {name: round_to_nearest(kept_OI, name) for name in FORMATS[quant]}
        parameter.data.copy_(rounded[quant])
        lost = 0.0
        for each, target_BTD in zip(ids, dense, strict=True):
            lost_BTD = (compute_states(model, each) - target_BTD).square().sum(-1)
            lost += float((lost_BTD / target_BTD.square().sum(-1)).sum())
        parameter.data.copy_(kept_OI)

        # One measured error scales those of the other formats.
        squares = {name: float((each - kept_OI).square().sum()) for name, each in rounded.items()}
        errors[tensor.name] = {name: lost * squares[name] / squares[quant] for name in rounded}
        sizes[tensor.name] = kept_OI.numel()

    return list(spend_bits(errors, sizes, quant).items())


def spend_bits(
    errors: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], quant: str
) -> dict[str, str]:
    """Return the formats with the least sum of errors and at most one format's bits."""
    bits = {name: quants.load(name).bits for name in FORMATS[quant]}
    limit = bits[quant] * sum(sizes.values())
    for price in np.geomspace(1e-12, 1e3, 3000):  # of a bit: the first that keeps to the limit
        chosen = {
            tensor: min(bits, key=lambda name: each[name] + price * sizes[tensor] * bits[name])
            for tensor, each in errors.items()
        }
        if sum(sizes[tensor] * bits[name] for tensor, name in chosen.items()) <= limit:
            return chosen
    raise AssertionError("the narrowest formats keep to the limit")


if __name__ == "__main__":
    main()

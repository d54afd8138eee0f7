"""What do half of the feed-forward channels save on stock llama.cpp? Decoding and prefill.

    python -m benchmarks.structure_llamacpp --work build/structure

Writes the Llamas of 1.1B random weights of ``structure_onnx.py``: dense, with half of the channels
in each block, and with widths that differ from block to block and halve them on average. racdeploy
exports them, the last one as architecture ``deci``, and ``llama_cpp.Llama`` of the plain wheel runs
them. Sides take turns, each time in a process of its own; figures are medians. ``bytes`` is the
dense file over the side's, what decoding would gain if a token cost nothing but reading weights,
and ``of bytes`` the share of it that was gained.

With ``--files dense=A.gguf "ffn 0.5"=B.gguf`` these files are measured instead, the first as
dense. ``--no-mmap`` reads files into memory: a mapped file's pages lie in the system's cache as
they happened to get there, and that alone made equal files of 145 MB differ by up to 1.7 times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.accel_llamacpp import Side, run_child
from benchmarks.structure_onnx import spread, write_model
from racdeploy import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Export


def main() -> None:
    """Export where need be, measure, print a table per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/structure"))
    parser.add_argument("--quants", nargs="+", default=["q8_0", "q4_0"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each turn")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--files", nargs="*", default=[], metavar="LABEL=FILE")
    parser.add_argument("--no-mmap", action="store_true")
    arguments = parser.parse_args()
    sides = name_files(arguments) if arguments.files else write_sides(arguments)

    for threads in arguments.threads:
        columns = ["quant", "side", "MB", "bytes", "decode ms", "×", "of bytes", "prefill ms", "×"]
        print(f"\n{threads} thread{'s' * (threads > 1)}\n")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for quant, each in sides.items():
            report(quant, each, threads, arguments)


def name_files(arguments: argparse.Namespace) -> dict[str, list[Side]]:
    """Return the files of the command line as the sides of one number format."""
    sides = []
    for pair in arguments.files:
        label, _, file = pair.partition("=")
        sides.append(Side(label, Path(file), sparse=False, use_mmap=not arguments.no_mmap))
    return {"": sides}


def write_sides(arguments: argparse.Namespace) -> dict[str, list[Side]]:
    """Return the synthetic model's sides by number format, written where need be."""
    inner = 4 * arguments.hidden
    channels = {
        "dense": [inner] * arguments.blocks,
        "half, all alike": [inner // 2] * arguments.blocks,
        "half, per block": spread(inner, arguments.blocks),
    }
    return {
        quant: [write_side(arguments, quant, *each) for each in channels.items()]
        for quant in arguments.quants
    }


def write_side(
    arguments: argparse.Namespace, quant: str, name: str, channels: Sequence[int]
) -> Side:
    """Write a model and its file unless they are there."""
    folder = arguments.work / name.replace(", ", "-").replace(" ", "-")
    if not (folder / "config.json").is_file():
        write_model(folder, channels, arguments.hidden)

    file = folder / f"{quant}.gguf"
    if not file.is_file():
        export.write(Checkpoint(folder), file, Export(quant=quant))
    return Side(name, file, sparse=False, use_mmap=not arguments.no_mmap)


def report(quant: str, sides: Sequence[Side], threads: int, arguments: argparse.Namespace) -> None:
    """Measure the sides in turns and print their rows."""
    rounds: dict[str, list[dict[str, float]]] = {side.label: [] for side in sides}
    for number in range(arguments.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            rounds[side.label].append(run_child(side, threads, arguments.tokens))

    dense = rounds[sides[0].label]
    dense_bytes = sides[0].file.stat().st_size
    for side in sides:
        found = rounds[side.label]
        size_bytes = side.file.stat().st_size
        saved = dense_bytes / size_bytes
        cells = [quant, side.label, f"{size_bytes / 1e6:.0f}", f"{saved:.2f}"]

        for column in ("decode_ms", "prefill_ms"):
            pairs = zip(dense, found, strict=True)
            gained = median(base[column] / other[column] for base, other in pairs)
            cells += [f"{median(other[column] for other in found):.1f}", f"{gained:.2f}"]
            if column == "decode_ms":
                cells.append(f"{gained / saved:.2f}")

        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""How fast would sparse kernels be on a board that is not at hand? And how right is that?

    apt-get install g++-aarch64-linux-gnu llvm-19
    python -m kernels.benchmarks.board_forecast          # boards: cycles of the loops, tokens/s
    python -m kernels.benchmarks.board_forecast --here   # this machine: predicted beside measured

Every loop is compiled for AArch64, cut out of the assembly and timed by llvm-mca; it is never run.
Dense ones are llama.cpp's (``_dense_neon.cpp``). A loop takes what llvm-mca says, or what its
instructions take to decode, if that is more: LLVM has no model of the Cortex-A76 and takes that of
its twin, Neoverse N1, which does not know the decoder. ``-dispatch`` is given, since LLVM 19 and 22
differ in it: Arm's guide to the N1 has 8.

A token of the 1.1B model of ``llamacpp.py`` is its linears and its dense Q8_0 output
projection; all else (attention, norms, waiting of threads) is left out. On one core, weights come
from memory while others are multiplied, in part: a quarter of the shorter of both times is hidden
for llama.cpp's dense loops, and half of it for ours, which ask memory ahead. These two shares were
found on one thread of a Zen 4. Several threads share what cores multiply and what memory gives.
With ``--here`` nothing comes from llvm-mca: both sides are measured from the cache, memory too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kernels.benchmarks._cache_speed import measure_ns
from kernels.benchmarks._llama import Side, run_child
from kernels.benchmarks.llamacpp import (
    BITS,
    BLOCKS,
    HIDDEN,
    LINEARS,
    VOCABULARY,
    bandwidth,
    write_model,
)

COMPILER = "aarch64-linux-gnu-g++"
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-march=armv8.2-a+dotprod")
SOURCES = Path(__file__).parents[1] / "sources"
HIDDEN_SHARE = {"dense": 0.25, "sparse": 0.5}  # of the shorter of computing and reading
_OUTPUT_WEIGHTS = VOCABULARY * HIDDEN
_LINEAR_WEIGHTS = BLOCKS * sum(outputs * inputs for outputs, inputs in LINEARS.values())


@dataclass(frozen=True)
class Core:
    """A processor core: its model in llvm-mca, and what it decodes in a cycle."""

    name: str
    model: str
    decoded: int
    dispatched: int = 0  # micro-operations a cycle; 0 leaves it to the model


A76 = Core("Cortex-A76", "neoverse-n1", decoded=4, dispatched=8)
M1 = Core("Apple M1", "apple-m1", decoded=8)
CORES = (A76, Core("Neoverse V2", "neoverse-v2", decoded=6), M1)


@dataclass(frozen=True)
class Board:
    """Cores, clock, and what memory gives one core and all of them, in GB/s."""

    name: str
    core: Core
    cores: int
    ghz: float
    core_gb_s: float
    gb_s: float


BOARDS = (
    Board("Raspberry Pi 5", A76, 4, 2.4, core_gb_s=8.0, gb_s=11.4),
    Board("Apple M1, performance cores", M1, 4, 3.2, core_gb_s=50.0, gb_s=60.0),
)


@dataclass(frozen=True)
class Loop:
    """An inner loop: where it is, how many weights one turn of it takes, and bits of a weight."""

    name: str
    quant: str
    kind: str  # dense or sparse
    source: Path
    function: str  # a pattern of its name, as c++filt writes it
    weights: int
    bits: float


_NEON = SOURCES / "neon.cpp"
_DENSE = Path(__file__).with_name("_dense_neon.cpp")


def loops() -> list[Loop]:
    """Return the loops that one token takes."""
    found = []
    for quant, number in (("Q8_0", 8), ("Q4_0", 2)):
        bits, value_bits, place_bits = BITS[quant]
        half_bits = bits - value_bits + place_bits + value_bits / 2
        dense = f"dense_{quant.lower()}"
        spread = rf"multiply_rows<.*{number}, 2>"
        picked = rf"multiply_rows_of_picked<.*{number}, 2>"
        found += [
            Loop(f"{quant} dense", quant, "dense", _DENSE, dense, 128, bits),
            Loop(f"{quant} 50 % zeros", quant, "sparse", _NEON, spread, 512, half_bits),
            Loop(f"{quant} 2:4", quant, "sparse", _NEON, picked, 512, half_bits),
        ]
    return found


def compile_loop(loop: Loop) -> list[str]:
    """Return the instructions of a loop."""
    command = [COMPILER, *FLAGS, f"-I{SOURCES}", "-S", str(loop.source), "-o", "-"]
    assembly = _run(command)
    for name, body in re.findall(r"^(\w[\w.]*):$(.*?)^\t\.size\t\1,", assembly, re.M | re.S):
        if re.search(rf"\b{loop.function}", _run(["c++filt", name.split(".")[0]])):
            return max(_turns(body), key=len)
    raise SystemExit(f"{loop.source.name} has no function {loop.function}")


def _turns(body: str) -> Iterator[list[str]]:
    """Yield what is between a label and a jump back to it, for every such pair."""
    lines = body.splitlines()
    labels: dict[str, int] = {}
    for index, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = index
        jump = re.match(r"\t(?:b\.?\w*|cbn?z)\s+(?:\w+, )?(\.L\w+)$", line)
        if jump and jump[1] in labels:
            between = lines[labels[jump[1]] : index + 1]
            yield [line for line in between if re.match(r"\t[a-z]", line)]


def cycles(instructions: list[str], core: Core, tool: str) -> float:
    """Return the cycles of one turn of a loop on a core."""
    turns = 200
    command = [tool, "-mtriple=aarch64", f"-mcpu={core.model}", "-mattr=+dotprod"]
    command += [f"-iterations={turns}"]
    if core.dispatched:
        command.append(f"-dispatch={core.dispatched}")

    report = _run(command, "\n".join(instructions))
    total = re.search(r"^Total Cycles:\s+(\d+)$", report, re.M)
    assert total is not None
    return max(int(total[1]) / turns, len(instructions) / core.decoded)


def combine(kind: str, compute_s: float, read_s: float) -> float:
    """Return how long one core takes that multiplies and reads so long."""
    shorter, longer = sorted((compute_s, read_s))
    return longer + (1 - HIDDEN_SHARE[kind]) * shorter


@dataclass(frozen=True)
class Part:
    """Weights of one kind, with what 64 of them take one core from the cache."""

    kind: str
    weights: int
    bits: float
    seconds_of_64: float

    @property
    def gigabytes(self) -> float:
        """Bytes that a token reads, in 1e9."""
        return self.weights * self.bits / 8e9

    @property
    def compute_s(self) -> float:
        """What all of them take one core from the cache."""
        return self.weights / 64 * self.seconds_of_64


def token_s(
    parts: list[Part], threads: int, core_gb_s: float, gb_s: float, scaling: float
) -> float:
    """Return the seconds of a token.

    Args:
        parts: of the model.
        threads: how many.
        core_gb_s: what memory gives one thread.
        gb_s: what it gives these threads together.
        scaling: what these threads multiply together, in units of what one does.
    """
    alone = sum(combine(p.kind, p.compute_s, p.gigabytes / core_gb_s) for p in parts)
    compute_s = sum(p.compute_s for p in parts) / scaling
    read_s = sum(p.gigabytes for p in parts) / gb_s
    return max(alone / threads, compute_s, read_s)


def forecast_boards(tool: str) -> None:
    """Print the tables of loops and boards."""
    timed: dict[tuple[str, str], float] = {}
    print("| loop, 64 weights | instructions |", *(f"{core.name} |" for core in CORES))
    print("|---|---|" + "---|" * len(CORES))
    for loop in loops():
        instructions = compile_loop(loop)
        share = 64 / loop.weights
        for core in CORES:
            timed[loop.name, core.name] = cycles(instructions, core, tool) * share
        cells = [f"{timed[loop.name, core.name]:.1f}" for core in CORES]
        print(f"| {loop.name} | {len(instructions) * share:.1f} | {' | '.join(cells)} |")

    for board in BOARDS:
        threads = range(1, board.cores + 1)
        memory = f"{board.core_gb_s:g} GB/s one core, {board.gb_s:g} all"
        print(f"\n{board.name}: {board.cores} cores, {board.ghz:g} GHz, {memory}\n")
        print("| tokens/s predicted |", *(f"{n} thread{'s' * (n > 1)} |" for n in threads))
        print("|---|" + "---|" * board.cores)
        for quant in BITS:
            rows = [loop for loop in loops() if loop.quant == quant]
            dense_s = [_board_token_s(rows[0], board, timed, n) for n in threads]
            for loop in rows:
                seconds = [_board_token_s(loop, board, timed, n) for n in threads]
                cells = [
                    f"{1 / s:.1f} ({d / s:.2f} ×)" for s, d in zip(seconds, dense_s, strict=True)
                ]
                print(f"| {loop.name} | {' | '.join(cells)} |")


def _board_token_s(
    loop: Loop, board: Board, timed: dict[tuple[str, str], float], threads: int
) -> float:
    tick = 1e-9 / board.ghz
    core = board.core.name
    parts = [
        Part(loop.kind, _LINEAR_WEIGHTS, loop.bits, timed[loop.name, core] * tick),
        Part("dense", _OUTPUT_WEIGHTS, BITS["Q8_0"][0], timed["Q8_0 dense", core] * tick),
    ]
    gb_s = min(board.gb_s, threads * board.core_gb_s)
    return token_s(parts, threads, board.core_gb_s, gb_s, scaling=threads)


def validate_here(work: Path, rounds: int, threads_tried: list[int]) -> bool:
    """Print predicted beside measured tokens/s of this machine; return whether 20 % hold."""
    off: list[float] = []
    print("| model | side | threads | GB/s | ns for 64 | tokens/s predicted | measured | off |")
    print("|---|---|---|---|---|---|---|---|")
    for quant in BITS:
        file = write_model(work, "llama", quant, "0.5")
        for threads in threads_tried:
            for kind, predicted_s, figures in _predict_here(quant, threads):
                side = Side(kind, file, kind == "sparse")
                runs = [run_child(side, threads, 32)["decode_ms"] for _ in range(rounds)]
                measured_s = median(runs) / 1000
                off.append(measured_s / predicted_s - 1)
                speeds = f"{1 / predicted_s:.1f} | {1 / measured_s:.1f} | {off[-1]:+.0%}"
                print(f"| {quant} | {kind} | {threads} | {figures} | {speeds} |", flush=True)
    return max(map(abs, off)) <= 0.2


def _predict_here(quant: str, threads: int) -> Iterator[tuple[str, float, str]]:
    """Yield each side, the seconds of a token, and what was measured for them."""
    bits, value_bits, place_bits = BITS[quant]
    bits_of = {"dense": bits, "sparse": bits - value_bits + place_bits + value_bits / 2}
    output_ns, _ = measure_ns("q8_0", 0.5, 1)
    alone = measure_ns(quant.lower(), 0.5, 1)
    together = measure_ns(quant.lower(), 0.5, threads)
    core_gb_s, gb_s = (bandwidth(n) / 1e9 for n in (1, threads))

    for kind, alone_ns, shared_ns in zip(bits_of, alone, together, strict=True):
        parts = [
            Part(kind, _LINEAR_WEIGHTS, bits_of[kind], alone_ns * 1e-9),
            Part("dense", _OUTPUT_WEIGHTS, BITS["Q8_0"][0], output_ns * 1e-9),
        ]
        scaling = threads * alone_ns / shared_ns  # of two threads of one core both take longer
        seconds = token_s(parts, threads, core_gb_s, gb_s, scaling)
        yield kind, seconds, f"{gb_s:.1f} | {shared_ns:.2f}"


def _run(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr[:2000]}")
    return done.stdout


def main() -> None:
    """Predict for boards, or compare with this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="predicted beside measured, here")
    parser.add_argument("--work", type=Path, default=Path("build/accel"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--mca", default="llvm-mca-19", help="the program llvm-mca, 15 or newer")
    arguments = parser.parse_args()
    if not arguments.here:
        forecast_boards(arguments.mca)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not validate_here(arguments.work, arguments.rounds, arguments.threads):
        sys.exit(1)


if __name__ == "__main__":
    main()

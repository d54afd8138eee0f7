"""Whether a built plug-in may be used: the same products as ggml's own kernels, and faster; tried in a child process.

``python -m racdeploy.accel.trial LIBRARY`` compares every kernel with ggml's own on random shapes, measures both side
by side, and prints what it found as JSON. The verdict is kept beside the library with its hash: a library that changed
is not the one that was proven.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import racdeploy
from racdeploy.accel.build import file_digest
from racdeploy.accel.llamacpp import QUANTS, Plugin

_TRIAL_S = 600.0
_TOLERANCE = 1e-6  # of the largest output: float32 sums in another order
_SHAPES = 12
_ZEROS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_ROWS, _COLUMNS = 2048, 4096
_DENSE_BYTES = 72 << 20  # more than a cache holds, so that weights come from memory as a model's do
_BITS = {"q8_0": 8.5, "q4_0": 4.5, "f16": 16.0, "bf16": 16.0}
_RUNS = 9
_FASTER = 1.05


@dataclass(frozen=True)
class Verdict:
    """What the trial of a library found.

    Args:
        refusal: why it may not be used; empty where it may.
        sha256: of the library.
        instruction_set: of the kernels that this processor gets.
        difference: largest one from ggml's own kernels, over the largest output.
        speedups: of one token on one thread, by number format (and pattern) and share of zeros.
        faster_from: least share of zeros from which on it is faster, by number format; without those that never are.
    """

    refusal: str
    sha256: str
    instruction_set: str = ""
    difference: float = 0.0
    speedups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    faster_from: Mapping[str, float] = field(default_factory=dict)


def prove(library: Path) -> Verdict:
    """Try a library in a child process, and keep the verdict beside it.

    Raises:
        EnvironmentFailure: the verdict cannot be written.
    """
    from racdeploy.storage.files import disk_errors, write_atomic

    sha256 = file_digest(library)
    found, refusal = _run_child(library)
    if not refusal and not found["faster_from"]:
        refusal = f"its {found['instruction_set']} kernels are not faster than ggml's own on this processor"
    verdict = Verdict(refusal, sha256, **found)
    with disk_errors(_verdict_file(library)):
        write_atomic(_verdict_file(library), json.dumps(asdict(verdict), indent=1))
    return verdict


def read_verdict(library: Path) -> Verdict | str:
    """Return what was found of a library, or why nothing is known of it."""
    file = _verdict_file(library)
    if not file.is_file():
        return f"{library} was never tried: racdeploy accel build"
    try:
        verdict = Verdict(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return f"{file} is damaged: racdeploy accel build"
    if verdict.sha256 != file_digest(library):
        return f"{library} is not the one that was tried: racdeploy accel build"
    return verdict


def _verdict_file(library: Path) -> Path:
    return library.with_suffix(".json")


def _run_child(library: Path) -> tuple[dict[str, Any], str]:
    """Return what the child found, and why the library is refused."""
    path = os.pathsep.join(
        filter(None, (str(Path(racdeploy.__file__).parents[1]), os.environ.get("PYTHONPATH")))
    )
    command = [sys.executable, "-P", "-m", "racdeploy.accel.trial", str(library)]
    environment = {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TRIAL_S,
            check=False,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return {}, f"its self-test did not end within {_TRIAL_S:.0f} s"
    if done.returncode < 0:
        return {}, f"its self-test died with {signal.Signals(-done.returncode).name}"
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = next(reversed(done.stderr.strip().splitlines()), "no message")
        return {}, f"its self-test ended with exit code {done.returncode}: {last}"
    return found, found.pop("failure")


def _try(library: Path) -> dict[str, Any]:
    """Return what a library does in this process; ``failure`` says what is wrong with it."""
    plugin = Plugin(library)
    found: dict[str, Any] = {
        "failure": "",
        "instruction_set": plugin.instruction_set,
        "difference": 0.0,
    }
    if not plugin.enable([], 2):
        return found | {"failure": "ggml does not take it"}
    rng = random.Random(0)
    for quant in QUANTS:
        for seed in range(_SHAPES):
            shape = _random_shape(rng, seed)
            difference = plugin.difference(quant, *shape, seed)
            found["difference"] = max(found["difference"], difference)
            if not 0.0 <= difference <= _TOLERANCE:
                rows, columns, tokens, threads, zeros, _ = shape
                problem = (
                    f"differs by {difference:.1e}"
                    if difference >= 0
                    else "does not give back what was written"
                )
                of = f"{quant} {rows} × {columns} with {zeros:.0%} zeros, {tokens} tokens on {threads} threads"
                return found | {"failure": f"its self-test failed: {of}: {problem}"}
    return found | _speeds(plugin)


def _random_shape(rng: random.Random, seed: int) -> tuple[int, int, int, int, float, bool]:
    """Return rows, columns, tokens, threads, zeros and whether they are 2:4; the first seeds are the hard cases."""
    rows, columns, tokens = (
        rng.randint(16, 300),
        32 * rng.randint(1, 90),
        rng.choice((1, 1, 2, 3, 5, 8, 17, 65)),
    )
    zeros = {0: 0.0, 1: 1.0}.get(seed, rng.uniform(0.2, 0.95))
    if two_of_four := seed in (2, 3):
        columns, zeros = 128 * rng.randint(1, 20), 0.5
    return rows, columns, tokens, 1 + seed % 2, zeros, two_of_four


def _speeds(plugin: Plugin) -> dict[str, Any]:
    """Return speed-ups by number format and zeros, from many zeros down to where they end; and where that is."""
    speedups: dict[str, dict[str, float]] = {}
    faster_from: dict[str, float] = {}
    cases = [(quant, quant, zeros, False) for quant in QUANTS for zeros in _ZEROS] + [
        ("q8_0 2:4", "q8_0", 0.5, True)
    ]
    for name, quant, zeros, two_of_four in cases:
        measured = speedups.setdefault(name, {})
        if min(measured.values(), default=_FASTER) < _FASTER:
            continue
        measured[f"{zeros:g}"] = speedup = _speedup(plugin, quant, zeros, two_of_four)
        if speedup >= _FASTER:
            faster_from[name] = zeros
    return {"speedups": speedups, "faster_from": faster_from}


def _speedup(plugin: Plugin, quant: str, zeros: float, two_of_four: bool) -> float:
    count = max(1, int(_DENSE_BYTES / (_ROWS * _COLUMNS * _BITS[quant] / 8)))
    stock_ms, sparse_ms = plugin.times_ms(
        quant, _ROWS, _COLUMNS, 1, zeros, two_of_four, count, _RUNS
    )
    return stock_ms / sparse_ms


if __name__ == "__main__":
    print(json.dumps(_try(Path(sys.argv[1]))))

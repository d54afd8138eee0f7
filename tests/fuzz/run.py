"""A run of a harness: libFuzzer in a process of its own, again where an input ended that one."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.harness import CORPUS, Harness

_PROGRESS = re.compile(r"^#(\d+)\s.*\bcov: (\d+) ft: (\d+)")
_ROOT = Path(__file__).resolve().parents[2]
_MAX_ENDS = 100  # of the process, in one run
_HANG_S = 25  # judged by its own oracle before, unless native code hangs


@dataclass
class Tally:
    """What a run did.

    Args:
        edges: branches of racdeploy's code that some input took; ``features`` count how often, too.
        ended: inputs that ended the process and that the product ends at its limits.
        found: inputs that broke a promise.
    """

    executions: int = 0
    seconds: float = 0.0
    edges: int = 0
    features: int = 0
    ended: int = 0
    found: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.executions / max(self.seconds, 1e-9)
        text = f"{self.executions:,} executions in {self.seconds:.0f} s, {rate:,.0f} a second, "
        text += f"{self.edges:,} edges, {self.features:,} features, {len(self.found)} found"
        if self.ended:
            text += f", {self.ended} ended the process as a limit does"
        return "\n  ".join([text, *map(str, self.found)])


def run(harness: Harness, work: Path, seconds: float) -> Tally:
    """Fuzz a harness for so long.

    Args:
        work: folder of its new inputs (``corpus``), of what it finds (``found``), and of its log.
    """
    corpus, found = work / "corpus", work / "found"
    seeds = work / "seeds"
    for folder in (corpus, found, seeds, CORPUS / harness.name):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(harness.seeds()):
        (seeds / f"{number:03}").write_bytes(seed)

    words = work / "words"
    listed = harness.dictionary or (b"\0",)  # libFuzzer refuses an empty file
    words.write_text("".join(f'"{_escape(word)}"\n' for word in listed))

    tally = Tally()
    began = time.monotonic()
    before = set(found.iterdir())

    with (work / "log").open("w", encoding="utf-8", errors="replace") as log:
        for _ in range(_MAX_ENDS):
            left = round(seconds - (time.monotonic() - began))
            if left <= 0:
                break
            options = [f"-max_total_time={left}", f"-timeout={_HANG_S}", "-rss_limit_mb=3000"]
            options += [f"-artifact_prefix={found}/", f"-dict={words}", "-print_final_stats=1"]
            places = [str(corpus), str(CORPUS / harness.name), str(seeds)]
            code = _fuzz([harness.name, str(found), *places, *options], log, tally)
            if code == 0:
                break
            _judge_end(harness, found, before, tally)

    tally.seconds = time.monotonic() - began
    tally.found = sorted(set(found.glob("*.input")) - before)
    return tally


def _fuzz(arguments: Sequence[str], log: object, tally: Tally) -> int:
    """Run libFuzzer once, add what it did, and return its exit code."""
    command = [sys.executable, "-m", "tests.fuzz.engine", *arguments]
    executions = 0

    with subprocess.Popen(
        command,
        cwd=_ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            log.write(line)  # type: ignore[attr-defined]
            if match := _PROGRESS.match(line):
                executions = int(match[1])
                tally.edges = max(tally.edges, int(match[2]))
                tally.features = max(tally.features, int(match[3]))
            elif line.startswith("FOUND"):
                print(line.rstrip(), flush=True)

    tally.executions += executions
    return child.returncode


def _judge_end(harness: Harness, found: Path, before: set[Path], tally: Tally) -> None:
    """Judge the input that ended the process: alone, by all that the product does about it."""
    ends = [file for file in found.iterdir() if file not in before and file.suffix == ""]
    if not ends:
        raise RuntimeError(f"libFuzzer ended and left no input: see {found.parent / 'log'}")

    for file in ends:
        if harness.survives is not None and harness.survives(file.read_bytes()):
            file.unlink()
            tally.ended += 1
        else:
            file.rename(file.with_suffix(".input"))


def _escape(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)

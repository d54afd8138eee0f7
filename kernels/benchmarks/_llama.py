"""Ways to run a GGUF file with llama-cpp-python, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("_llama_child.py")


@dataclass(frozen=True)
class Side:
    """One way to run one file."""

    label: str
    file: Path
    sparse: bool
    use_mmap: bool = True


def run_child(side: Side, threads: int, tokens: int, state: str = "warm") -> dict[str, float]:
    """Measure in a process of its own."""
    how = {"sparse": side.sparse, "use_mmap": side.use_mmap}
    values = {"file": str(side.file), **how, "threads": threads, "tokens": tokens, "state": state}
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(values)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{asdict(side)}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found

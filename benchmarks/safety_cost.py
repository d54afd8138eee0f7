"""What limits on a stranger's files cost a healthy bundle: two checkouts, one bundle, in turns.

Each run is a new process that imports racdeploy from a checkout, loads the bundle, waits for the
first text of an answer, answers short prompts and loads the bundle again. Runs of the two take
turns, and medians are compared. Processor time is that of the process and of all that it started.

    git worktree add /tmp/before COMMIT
    taskset -c 0 python benchmarks/safety_cost.py /tmp/before . BUNDLE --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

STEPS = ("load", "first token", "200 prompts", "load again")
_FIRST_TOKENS = 20
_PROMPTS = 200
_NEW_TOKENS = 16


def main() -> None:
    """Measure both and print a table; or, asked by itself, run once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    found: dict[str, list[dict[str, list[float]]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as cache:
        for round_number in range(-1, arguments.rounds):
            for arm in found:
                took = run(getattr(arguments, arm), arguments.bundle, Path(cache) / arm)
                if round_number >= 0:  # the one before compiles modules and hashes the artifact
                    found[arm].append(took)

    for step in STEPS:
        for place, clock in enumerate(("wall", "processor")):
            values = {arm: [took[step][place] for took in runs] for arm, runs in found.items()}
            print(json.dumps({"step": step, "clock": clock, **compare(**values)}))


def compare(before: list[float], after: list[float]) -> dict[str, float]:
    """Return medians in milliseconds, their ratio, and the median of the ratios of neighbours."""
    medians = statistics.median(before), statistics.median(after)
    pairs = [new / old for old, new in zip(before, after, strict=True)]
    return {
        "before_ms": round(medians[0] * 1000, 2),
        "after_ms": round(medians[1] * 1000, 2),
        "ratio": round(medians[1] / medians[0], 3),
        "paired": round(statistics.median(pairs), 3),
    }


def run(checkout: Path, bundle: Path, cache: Path) -> dict[str, list[float]]:
    """Return wall and processor seconds of each step in a new process."""
    own = {"PYTHONPATH": str(checkout.resolve()), "XDG_CACHE_HOME": str(cache)}
    code = f"import runpy; runpy.run_path({__file__!r}, run_name='once')['once']({str(bundle)!r})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        check=True,
    )
    took: dict[str, Any] = json.loads(done.stdout)
    assert Path(took.pop("imported")) == checkout.resolve() / "racdeploy"
    return took


def once(bundle: str) -> None:
    """Print what each step takes."""
    import racdeploy

    took: dict[str, Any] = {"imported": str(Path(racdeploy.__file__).parent)}
    models: list[Any] = []
    took["load"] = measure(lambda: models.append(racdeploy.load(bundle, threads=1)))
    model = models[0]

    def wait_for_text() -> None:
        with model.stream("What is 12 plus 34?", max_new_tokens=_NEW_TOKENS) as stream:
            next(stream)

    def answer() -> None:
        for number in range(_PROMPTS):
            model.generate(f"What is {number} plus 34?", max_new_tokens=_NEW_TOKENS)

    answer()  # whatever is made once is made now
    firsts = []
    for _ in range(_FIRST_TOKENS):
        firsts.append(measure(wait_for_text))
        model.generate("hi", max_new_tokens=1)  # the rest of the answer has ended
    took["first token"] = [statistics.median(times) for times in zip(*firsts, strict=True)]

    took["200 prompts"] = measure(answer)
    took["load again"] = measure(lambda: models.append(racdeploy.load(bundle, threads=1)))
    for each in models:
        each.close()
    print(json.dumps(took))


def measure(work: Callable[[], object]) -> list[float]:
    """Return wall and processor seconds."""
    started, began = time.perf_counter(), processor_s()
    work()
    return [time.perf_counter() - started, processor_s() - began]


def processor_s() -> float:
    """Return what this process and its children have taken."""
    ended = getrusage(RUSAGE_CHILDREN)
    running = sum(map(_clock_of, _children()))
    return time.process_time() + ended.ru_utime + ended.ru_stime + running


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def _clock_of(process: int) -> float:
    """Return the processor time of another process, by the clock that Linux names after it."""
    return time.clock_gettime((~process << 3) | 2)


if __name__ == "__main__":
    main()

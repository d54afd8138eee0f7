"""Does memory grow with the number of requests, and what does a server cost per request?

    racdeploy build --out bundle
    python -m benchmarks.many_requests bundle

Short requests, one after another: through ``racdeploy.load``, then through ``racdeploy serve`` in a
process of its own. Resident memory of the process that asks and of its engine is read after a
warm-up and at the end. At last, requests of many tasks at a time beside the same ones in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

import racdeploy

QUESTION = "What is 12 times 34?"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=1_000)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--together", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    with racdeploy.load(arguments.bundle, threads=arguments.threads, parallel=8) as model:
        engine: int = model.engine.pid  # type: ignore[attr-defined]

        def ask(number: int) -> None:
            model.generate(f"{QUESTION} ({number})", max_new_tokens=arguments.new_tokens)

        watch("load", ask, arguments, {"app": "self", "engine": str(engine)})
        ask_together(model, arguments.together)

    through_server(arguments)


def watch(
    name: str,
    ask: Callable[[int], None],
    arguments: argparse.Namespace,
    processes: dict[str, str],
) -> None:
    """Ask again and again; print memory after the warm-up and at the end."""
    for number in range(arguments.warm_up):
        ask(number)

    before = {process: resident_bytes(pid) for process, pid in processes.items()}
    started = time.perf_counter()
    for number in range(arguments.requests):
        ask(number)
    elapsed_s = time.perf_counter() - started

    after = {process: resident_bytes(pid) for process, pid in processes.items()}
    grown = [
        f"{process} {before[process] / 1e6:.1f} → {after[process] / 1e6:.1f} MB "
        f"({after[process] / before[process] - 1:+.2%})"
        for process in processes
    ]
    per_request_ms = 1000 * elapsed_s / arguments.requests
    print(f"{name}: {arguments.requests} requests, {per_request_ms:.2f} ms each;", *grown)


def ask_together(model: racdeploy.Model, count: int) -> None:
    """Ask in turn and together, and compare seconds and answers."""
    questions = [f"What is {i} times 34?" for i in range(11, 11 + count)]

    async def together() -> list[racdeploy.Result]:
        return await asyncio.gather(*map(model.agenerate, questions))

    started = time.perf_counter()
    alone = [model.generate(question) for question in questions]
    alone_s = time.perf_counter() - started
    started = time.perf_counter()
    answers = asyncio.run(together())
    together_s = time.perf_counter() - started

    same = sum(a == b for a, b in zip(alone, answers, strict=True))
    print(
        f"{count} tasks: {alone_s:.1f} s in turn, {together_s:.1f} s together "
        f"({alone_s / together_s:.1f} times as fast); {same} of {count} answers are the same"
    )


def through_server(arguments: argparse.Namespace) -> None:
    """Watch a server and its engine."""
    command = [sys.executable, "-m", "racdeploy", "serve", str(arguments.bundle), "--port", "0"]
    options = ["--threads", str(arguments.threads)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)

    with server:
        assert server.stdout is not None
        url = server.stdout.readline().strip().partition(" at ")[2]
        (engine,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()

        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

            def ask(number: int) -> None:
                messages = [{"role": "user", "content": f"{QUESTION} ({number})"}]
                body = {"messages": messages, "max_tokens": arguments.new_tokens}
                client.post("/chat/completions", json=body).raise_for_status()

            watch("serve", ask, arguments, {"server": str(server.pid), "engine": engine})

        server.terminate()


def resident_bytes(process: str) -> int:
    """Return the resident memory of a process (Linux)."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LookupError(process)


if __name__ == "__main__":
    main()

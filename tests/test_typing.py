"""A user's type checker sees the types of racdeploy: ``py.typed`` marks the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import racdeploy

ROOT = Path(racdeploy.__file__).parents[1]
PROGRAM = """
import racdeploy


def ask(bundle: str, question: str) -> tuple[str, int]:
    try:
        with racdeploy.load(bundle, threads=2) as model:
            result = model.generate(question, max_thinking_tokens=512)
    except racdeploy.RacdeployError as error:
        raise SystemExit(error.exit_code) from error

    reveal_type(result)
    return result.answer, result.thinking_tokens
"""


APP = """
import asyncio
import racdeploy


async def ask(model: racdeploy.Model, questions: list[str]) -> list[str]:
    results = await asyncio.gather(*(model.agenerate(q, temperature=0.5) for q in questions))
    messages = [{"role": "user", "content": "Hello"}]

    for piece in model.stream(messages, max_thinking_tokens=None):
        reveal_type(piece.kind)

    stream = model.astream(questions[0], seed=3)
    async for text, kind in stream:
        print(text)

    reveal_type(stream.result)
    reveal_type(model.continue_text([1, 2]))
    return [result.answer for result in results]
"""


def run_mypy(folder: Path, program: str) -> tuple[int, str]:
    """Check a program strictly, without a configuration; return the exit code and the output."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MYPYPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_users_program_is_checked_strictly(tmp_path: Path) -> None:
    """What ``racdeploy.load`` gives has its types, and a wrong use is found where it is."""
    code, printed = run_mypy(tmp_path, PROGRAM)
    assert code == 0, printed
    assert "racdeploy.runtime.model.Result" in printed

    wrong = PROGRAM.replace("threads=2", "threads='two'")
    wrong = wrong.replace("return result.answer,", "return result.answer_text,")
    code, printed = run_mypy(tmp_path, wrong)
    assert code == 1
    assert re.findall(r"\[([a-z-]+)\]", printed) == ["arg-type", "attr-defined"]


def test_an_asynchronous_program_is_checked_strictly(tmp_path: Path) -> None:
    """Tasks, iterators and their pieces have exact types; an option that is none is found."""
    code, printed = run_mypy(tmp_path, APP)
    assert code == 0, printed
    for revealed in ("'thinking'", "'answer'", "runtime.model.Result", "model.Continuation"):
        assert revealed in printed

    code, printed = run_mypy(tmp_path, APP.replace("seed=3", "sead=3"))
    assert (code, "[call-arg]" in printed) == (1, True), printed

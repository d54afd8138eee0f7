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
        print(text, kind)

    reveal_type(stream.result)
    reveal_type(model.continue_text([1, 2]))
    return [result.answer for result in results]
"""


MAKE = """
import racdeploy
from racdeploy.recipe import Pruning, Structure


def make(model: str) -> bool:
    recipe = racdeploy.Recipe(prune=Pruning(sparsity=0.5), structure=Structure(keep={"ffn": 0.75}))
    gate = racdeploy.Gate.read("gate.toml", {"accuracy.margin": 0.1})
    bundle = racdeploy.build(model, recipe=recipe, tasks=["gcd"], gate=gate, out="bundle")
    reveal_type(bundle)
    reveal_type(racdeploy.prune(model, recipe=racdeploy.Recipe.read("recipe.toml")).recovery)
    reveal_type(racdeploy.export(bundle.folder).size_bytes)
    reveal_type(racdeploy.tune(model, recipe="tune.toml").tuning.winner)
    reveal_type(racdeploy.inspect(bundle.folder).tensors[0].zeros)
    reveal_type(racdeploy.bench(bundle.folder, rounds=3).medians())
    verdict = racdeploy.verify(bundle.folder, tier="smoke", accel="off")
    return verdict.verdict == "pass" and verdict.accuracy > 0.5
"""


PROGRAMS = {"use": PROGRAM, "serve": APP, "make": MAKE}
MISUSES = {
    "use": (("threads=2", "threads='two'"), ("result.answer,", "result.answer_text,")),
    "serve": (("seed=3", "sead=3"),),
    "make": (("sparsity=0.5", "sparsty=0.5"), ("rounds=3", "rounds='3'")),
}


def check(folder: Path, programs: dict[str, str], *command: str) -> tuple[int, str]:
    """Let a type checker check programs without a configuration; return exit code and output."""
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MYPYPATH", None)
    files = [f"{name}.py" for name in programs]
    done = subprocess.run(
        [sys.executable, "-m", *command, *files],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def misuse(name: str) -> str:
    """Return a program with an unknown name, or a value of another type, in each place."""
    program = PROGRAMS[name]
    for right, wrong in MISUSES[name]:
        assert right in program
        program = program.replace(right, wrong)
    return program


def test_mypy_knows_the_types_of_users_programs(tmp_path: Path) -> None:
    """Strictly: results, tasks, iterators, records; what is wrong is found where it is."""
    mypy = ("mypy", "--strict", "--config-file=")
    code, printed = check(tmp_path, PROGRAMS, *mypy)
    assert code == 0, printed
    revealed = {
        name: re.findall(rf'{name}\.py.*Revealed type is "(.*)"', printed) for name in PROGRAMS
    }
    assert revealed == {
        "use": ["racdeploy.runtime.model.GenerationResult"],
        "serve": [
            "Literal['thinking'] | Literal['answer']",
            "racdeploy.runtime.model.GenerationResult",
            "racdeploy.runtime.model.Continuation",
        ],
        "make": [
            "racdeploy.api.records.Bundle",
            "tuple[racdeploy.results.pruning.RecoveryRow, ...]",
            "int",
            "str",
            "float | None",
            "tuple[typing.Mapping[str, float], typing.Mapping[str, float]]",
        ],
    }

    code, printed = check(tmp_path, {name: misuse(name) for name in PROGRAMS}, *mypy)
    assert code == 1
    found = {name: re.findall(rf"{name}\.py.*\[([a-z-]+)\]", printed) for name in PROGRAMS}
    assert found == {
        "use": ["arg-type", "attr-defined"],
        "serve": ["call-arg"],
        "make": ["call-arg", "arg-type"],
    }


def test_pyright_knows_them_too(tmp_path: Path) -> None:
    """With all rules of its strictest mode."""
    pyright = ("basedpyright", "--pythonpath", sys.executable)
    code, printed = check(tmp_path, PROGRAMS, *pyright)
    assert code == 0, printed
    assert '"bundle" is "Bundle"' in printed

    code, printed = check(tmp_path, {name: misuse(name) for name in PROGRAMS}, *pyright)
    assert code == 1
    rules = set(re.findall(r"\((report\w+)\)", printed))
    assert {"reportArgumentType", "reportAttributeAccessIssue", "reportCallIssue"} <= rules

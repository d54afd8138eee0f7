"""README as it is pasted: its commands parse, and the embedded model answers them right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import racdeploy
from racdeploy.cli.app import app
from racdeploy.tasks.sets.word_problem import GAINS, LOSSES
from tests.support.commands import racdeploy as run_racdeploy

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
(USE_IT,) = re.findall(r"^## Use it\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
LINES = [shlex.split(line, comments=True)[1:] for line in re.findall("^racdeploy .*", USE_IT, re.M)]
RUN = next(line for line in LINES if line[0] == "run")
QUESTIONS = sorted({*re.findall(r"[\"'](What is \d+ times \d+\?)", README + MAKEFILE), RUN[2]})


def _gold(question: str) -> int:
    """Work a question out: a product, or an amount with what is gained and lost."""
    if product := re.fullmatch(r"What is (\d+) times (\d+)\?", question):
        return int(product[1]) * int(product[2])

    first, *changes, _ = re.split(r"(?<=[.?]) ", question)
    start = re.fullmatch(r"\w+ has (\d+) \w+\.", first)
    assert start
    amount = int(start[1])

    for sentence in changes:
        phrase = re.sub(r"\d+", "{n}", sentence.rstrip(".").partition(" ")[2])
        assert phrase in GAINS + LOSSES, f"{phrase!r} is not what the model learnt"
        (change,) = re.findall(r"\d+", sentence)
        amount += int(change) if phrase in GAINS else -int(change)

    assert len(changes) in (3, 4), "other problems are outside what the model learnt"
    return amount


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_command_of_the_block_parses(line: list[str]) -> None:
    """Every option exists."""
    verb, *arguments = line
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]


def test_what_is_used_is_made_before() -> None:
    """The bundle that ``run`` and ``verify`` take is written by the last build above."""
    made = ""
    used = set()

    for line in LINES:
        if line[0] in ("build", "tune"):
            made = line[line.index("--out") + 1] if "--out" in line else ""
        else:
            assert line[1].rstrip("/") == made
            used.add(line[0])

    assert used == {"run", "verify"}


def test_the_run_line_runs_as_it_is_written(built: Path, tmp_path: Path) -> None:
    """In the folder that holds the bundle, with the right answer in the last line."""
    (tmp_path / "bundle").symlink_to(built)
    outcome = run_racdeploy(*RUN, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert f"\\boxed{{{_gold(RUN[2])}}}" in outcome.out


def test_every_question_is_answered_right(built: Path) -> None:
    """Those of README, and the one that ``make demo`` ends with."""
    assert len(QUESTIONS) > 2
    with racdeploy.load(built, threads=1) as model:
        answers = [result.answer for result in model.generate_many(QUESTIONS)]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert f"\\boxed{{{_gold(question)}}}" in answer, question


def test_the_python_example_runs(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings of the bundle that is built already, whose stages it takes."""
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    chosen = {"prune.sparsity": 0.5, "traces.count": 64, "verify.count": 60}
    settings = f'target="ci-smoke", recipe=racdeploy.Recipe.read(settings={chosen})'
    assert 'target="gguf"' in example
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RACDEPLOY_WORK", str(work))
    exec(compile(example.replace('target="gguf"', settings), "README.md", "exec"), {})

    verdict, *_, tokens = capsys.readouterr().out.split()
    assert verdict == "pass"
    assert int(tokens) > 20


@pytest.mark.slow
def test_the_block_runs_as_it_is_written(tmp_path: Path) -> None:
    """From the build of the embedded model on."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    first = LINES.index(RUN) - 1
    assert LINES[first][:2] == ["build", "--out"]

    for line in LINES[first:]:
        outcome = run_racdeploy(*line, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert outcome.code == 0, outcome.out + outcome.err
    assert (tmp_path / "junit.xml").is_file()

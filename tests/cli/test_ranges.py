"""Numbers out of their range are refused where they are typed, with exit code 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.engines.engine import EngineSettings
from racdeploy.engines.subprocess_engine import SubprocessEngine
from racdeploy.recipe import Recipe
from racdeploy.verification.gate import read_gate
from tests.support.errors import raises

RUN = ("run", "bundle", "2 + 2?")
OUT_OF_RANGE = [
    *((command, "--threads", "-1") for command in (("build",), ("traces",), ("prune",))),
    *((command, "--threads", "-2") for command in (RUN, ("verify", "b"), ("bench", "b"))),
    (("recover", "model", "pruned"), "--threads", "-1"),
    (RUN, "--seed", "-1"),
    (RUN, "--temperature", "-1"),
    (RUN, "--max-thinking-tokens", "-3"),
    (("build",), "--prompts", "0"),
    (("build",), "--trace-prompts", "0"),
    (("build",), "--recover-tokens", "-1"),
    (("bench", "b"), "--parallel", "0"),
    (("bench", "b"), "--rounds", "0"),
]


def _run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, re.sub(r"[\s│╭╮╰╯─]+", " ", done.output)


@pytest.mark.parametrize(("command", "option", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_with_its_range(
    command: tuple[str, ...], option: str, value: str
) -> None:
    """Before anything is read: neither the bundle nor the model has to be there."""
    code, output = _run(*command, option, value)
    assert code == 2, output
    assert f"Invalid value for '{option}'" in output
    # The words of the range are typer's, and change with its version.
    assert re.search(r"(>=|greater than or equal to) ?[01]", output), output


@pytest.mark.parametrize(
    ("written", "meant"), [("60", "0.6"), ("60%", "0.6"), ("2.5", "0.025"), ("12.5 %", "0.125")]
)
def test_per_cent_in_place_of_a_share_gets_a_suggestion(written: str, meant: str) -> None:
    """Whoever writes per cent is told the share that it is."""
    code, output = _run("build", "--dry-run", "--sparsity", written)
    assert code == 2, output
    assert f"did you mean {meant}?" in output


@pytest.mark.parametrize("written", ["1", "100", "-0.1", "half", "-60"])
def test_nothing_is_suggested_where_no_share_was_meant(written: str) -> None:
    """All weights cannot go, and nothing is guessed from other text."""
    code, output = _run("build", "--dry-run", "--sparsity", written)
    assert code == 2, output
    assert "prune.sparsity" in output
    assert "did you mean" not in output


def test_a_margin_in_per_cent_gets_a_suggestion(tmp_path: Path) -> None:
    """A gate file is read like a recipe."""
    for number, written in enumerate(("5", '"5%"')):
        file = tmp_path / f"{number}.toml"
        file.write_text(f"[accuracy]\nmargin = {written}\n", encoding="utf-8")
        with raises("invalid-settings", "accuracy.margin", "did you mean 0.05?"):
            read_gate(file)


@pytest.mark.parametrize("part", ["traces", "verify", "recover"])
def test_seeds_of_a_recipe_are_not_negative(part: str) -> None:
    """A seed that no generator takes is refused with the recipe."""
    with raises("invalid-settings", f"{part}.seed: "):
        Recipe.combine(None, {part: {"seed": -1}})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (EngineSettings(threads=-3), "threads"),
        (EngineSettings(parallel=0), "parallel"),
        (EngineSettings(context_tokens=0), "context_tokens"),
        (EngineSettings(context_tokens=2**62), "context_tokens"),
        (EngineSettings(threads=10**9), "threads"),
    ],
)
def test_an_engine_names_the_setting_that_is_wrong(settings: EngineSettings, named: str) -> None:
    """That one alone, and nothing of the others."""
    with raises("bad-engine-setting", str(getattr(settings, named))) as caught:
        SubprocessEngine("no.module", "engine", Path("model"), settings)
    names = ("threads", "parallel", "context_tokens")
    assert [name for name in names if name in caught.value.message] == [named]

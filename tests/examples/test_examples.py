"""Every example is used as its user would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from racdeploy.cli.app import app
from racdeploy.recipe import Recipe
from racdeploy.verification.gate import read_gate
from tests.support.tiny_artifacts import make_bundle

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.toml"))


def _command_lines(text: str) -> list[str]:
    """Return the racdeploy commands of a workflow's ``run:`` steps or of a README's code."""
    return re.findall(r"^(?:\s*- run: |#\s+)?(racdeploy [a-z]+ [^#\n]*)", text, re.MULTILINE)


def _parse(line: str) -> None:
    """Parse a command line as the shell would, without running it."""
    _, verb, *arguments = shlex.split(line)
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_is_complete_and_fits_its_target(file: Path) -> None:
    """Every key is known, every value allowed, and the target takes the result."""
    verify = Recipe.combine(file, {}).verify
    found = verify.max_new_tokens == verify.context_tokens == 0
    assert found or verify.max_new_tokens < verify.context_tokens


def test_the_recipes_say_what_their_names_say() -> None:
    """The three recipes differ where it matters."""
    own, quick, semi = (Recipe.combine(file, {}) for file in RECIPES)
    assert (quick.model, quick.prune.sparsity, quick.prune.pattern) == (
        "tiny-reasoner",
        0.6,
        "unstructured",
    )
    assert (semi.prune.pattern, semi.prune.sparsity) == ("2:4", 0.5)
    assert own.tasks == ("jsonl:problems.jsonl",)


def test_the_gate_sets_limits() -> None:
    """The gate file parses, and names the checks whose limits it sets."""
    assert {"accuracy", "thinking"} == read_gate(
        EXAMPLES / "ci" / "racdeploy-gate.toml"
    ).required_checks


@pytest.mark.parametrize(
    "file",
    [EXAMPLES / "ci" / "verify.yml", EXAMPLES / "README.md", *RECIPES],
    ids=lambda file: file.name,
)
def test_written_commands_parse(file: Path) -> None:
    """Each command that an example tells the user to type has only options that exist."""
    lines = _command_lines(file.read_text(encoding="utf-8"))
    assert lines
    for line in lines:
        _parse(line)


def test_a_command_with_a_wrong_option_would_be_noticed() -> None:
    """The parser behind the test above refuses what does not exist."""
    with pytest.raises(Exception, match=r"--gaet"):
        _parse("racdeploy verify bundle/ --gaet racdeploy-gate.toml")


def test_the_app_prints_thinking_and_answer(tmp_path: Path) -> None:
    """The app runs on a bundle, and neither colour nor torch gets into its output or process."""
    bundle = make_bundle(tmp_path)
    command = [
        sys.executable,
        "-X",
        "importtime",
        "examples/embed/app.py",
        str(bundle),
        "How many?",
        "--threads",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.index("Thinking:\n") < done.stdout.index("Answer:\n")
    assert "\x1b" not in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_the_app_ends_with_the_exit_code_of_an_error(tmp_path: Path) -> None:
    """A folder that is no bundle is one sentence with a remedy."""
    command = [sys.executable, "examples/embed/app.py", str(tmp_path), "How many?"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a bundle" in done.stderr


def test_the_workflow_gives_the_action_what_it_takes() -> None:
    """Every input and output that the example names exists, and the required one is given."""
    workflow = yaml.safe_load((EXAMPLES / "ci" / "pull_request.yml").read_text(encoding="utf-8"))
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    (step,) = [
        step for step in workflow["jobs"]["verify"]["steps"] if "racdeploy" in step.get("uses", "")
    ]
    assert {name for name, spec in action["inputs"].items() if spec.get("required")} <= set(
        step["with"]
    )
    assert set(step["with"]) <= set(action["inputs"])
    named = re.findall(
        r"steps\.racdeploy\.outputs\.([\w-]+)", (EXAMPLES / "ci" / "pull_request.yml").read_text()
    )
    assert set(named) <= set(action["outputs"])

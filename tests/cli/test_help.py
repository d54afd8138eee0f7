"""Help: short options, defaults, an example of every command, completion of the shell."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from racdeploy import plugins
from racdeploy.cli.app import app

COMMANDS = [command.name for command in app.registered_commands if command.name]


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, flag: str) -> None:
    """By either name; flags are shown without a type."""
    done = CliRunner().invoke(app, [command, flag], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    assert f"Example: racdeploy {command}" in " ".join(done.output.split())
    types = [line for line in done.output.splitlines() if "bool" in line]
    assert all("--help" in line for line in types)


def test_help_of_build_says_the_defaults() -> None:
    """Of what decides the bundle."""
    done = CliRunner().invoke(app, ["build", "-h"], env={"COLUMNS": "300"})
    output = " ".join(done.output.split())
    for text in (
        "default: 0, or 0.5 if other options need zeros",
        "unstructured, the default",
        "Pruning method; default: sparsegpt",
        "default: q8_0",
        "Number of evaluation prompts, in place of the tier's; default: 200",
        "default: the artifact's name",
    ):
        assert text in output


def test_what_people_use_comes_first() -> None:
    """The rest is under More."""
    output = CliRunner().invoke(app, ["-h"], env={"COLUMNS": "100"}).output
    first, _, more = output.partition("─ More ─")
    rows = re.findall(r"^│ (\w+) ", first, re.MULTILINE)
    first_words = ["build", "tune", "run", "chat", "serve", "verify", "compare"]
    first_words += ["report", "inspect"]
    assert rows == first_words
    assert all(f"│ {command} " in more for command in set(COMMANDS) - set(first_words))


def test_options_of_build_are_in_groups() -> None:
    """None is left over, and parts that can be cut are those of the folder."""
    output = CliRunner().invoke(app, ["build", "-h"], env={"COLUMNS": "300"}).output
    groups = [line.strip("╭─╮ ") for line in output.splitlines() if line.startswith("╭")]
    assert groups[2:] == [
        "Model and task",
        "Pruning",
        "Number format and packing",
        "Recovery",
        "Verification",
        "Output and resources",
    ]
    own = output.partition("─ Options ─")[2].partition("╰")[0]
    assert re.findall(r"--[\w-]+", own) == ["--dry-run", "--quiet", "--json", "--help"]
    assert f"part to keep: {', '.join(plugins.list_names('structures'))};" in output


def test_the_shell_can_complete() -> None:
    """Typer's own options install it or print it."""
    output = CliRunner().invoke(app, ["-h"], env={"COLUMNS": "100"}).output
    assert "--install-completion" in output
    assert "--show-completion" in output

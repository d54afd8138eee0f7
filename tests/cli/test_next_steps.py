"""What to do with a new bundle: commands that can be copied as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path

from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.cli.build import list_commands
from tests.support.records import record


def _bundle(folder: Path, *answered: tuple[str, str, bool]) -> Path:
    """Write the records of arms that answered questions, right or wrong."""
    folder.mkdir()
    lines = []
    for prompt, (arm, question, correct) in enumerate(answered):
        made = record(prompt, arm=arm, question=question, correct=correct)
        lines.append(made.model_dump_json() + "\n")
    (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_commands_name_the_bundle_and_a_question_that_it_answers(
    tmp_path: Path,
) -> None:
    """Each is one that the command line takes; names with spaces are quoted."""
    folder = _bundle(
        tmp_path / "my bundle",
        ("dense", "What is 2 + 2?", True),
        ("pruned", "What is 2 + 2?", False),
        ("pruned", "Long? " * 20, True),
        ("pruned", "What is 3 + 3?", True),
    )
    commands = [shlex.split(each) for each in list_commands(folder, tmp_path)]

    assert commands == [
        ["racdeploy", "run", str(folder), "What is 3 + 3?"],
        ["racdeploy", "chat", str(folder)],
        ["racdeploy", "serve", str(folder)],
        ["racdeploy", "verify", str(folder)],
        ["racdeploy", "bench", str(folder), "--work", str(tmp_path)],
        ["racdeploy", "report", str(folder)],
    ]
    for verb in ("run", "chat", "serve", "verify", "bench", "report"):
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0

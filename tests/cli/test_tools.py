"""``inspect`` and ``doctor``: what is said last, and what is no failure."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

from racdeploy import errors
from racdeploy.cli import console, doctor
from racdeploy.cli.app import app
from tests.support.tiny_models import make_checkpoint


def test_the_summary_of_a_folder_comes_last_or_alone(tmp_path: Path) -> None:
    """With totals by type; the tensors can be left out."""
    folder = make_checkpoint(tmp_path / "model", "qwen2")
    whole = CliRunner().invoke(app, ["inspect", str(folder)]).output
    short = CliRunner().invoke(app, ["inspect", str(folder), "--summary"]).output
    assert whole.endswith(short)
    assert "model.norm.weight" in whole
    assert "model.norm.weight" not in short
    first, *_ = [line.split() for line in short.splitlines() if line.strip()]
    assert first == ["type", "tensors", "size"]
    assert f"folder: {folder}" in short


def test_a_base_install_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is a hint with the line that installs it."""
    monkeypatch.setattr(doctor, "is_installed", lambda module: False)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    found = {each["what"]: each for each in json.loads(done.stdout)["findings"]}
    assert found["torch"]["state"] == "unused"
    assert 'pip install "racdeploy[prune]"' in found["torch"]["detail"]
    assert found["llama.cpp"]["state"] == "unused"


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("/home/a/.venv", 'pip install "racdeploy[tasks]"'),
        ("/home/a/.local/pipx/venvs/racdeploy", 'pipx runpip racdeploy install "racdeploy[tasks]"'),
        (
            "/home/a/.local/share/uv/tools/racdeploy",
            'uv tool install "racdeploy[tasks] @ git+https://h/r"',
        ),
        ("/home/a/.cache/uv/archive-v0/x", 'uvx --from "racdeploy[tasks] @ git+https://h/r" rac'),
    ],
)
def test_a_remedy_installs_where_racdeploy_is(
    prefix: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment of pipx or uvx has no pip of its own on the path."""

    class Installed:
        def read_text(self, _: str) -> str:
            return '{"url": "https://h/r", "vcs_info": {"vcs": "git"}}'

    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Installed())
    remedy = errors.MissingExtraError("datasets", "tasks").remedy
    assert remedy.startswith(expected)


def test_a_vocabulary_alone_is_called_so(tmp_path: Path) -> None:
    """Not two tables without rows."""
    file = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = CliRunner().invoke(app, ["inspect", str(file)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("no tensors: a vocabulary alone\n")


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores, products, memory, driver and compiler; what is not there can be done without."""
    monkeypatch.setattr(doctor, "free_bytes", lambda: 3 << 30)
    monkeypatch.setattr(doctor, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    found = {each["what"]: each for each in doctor.examine()}
    assert found["memory"]["detail"] == "3.0 GiB free"
    assert found["cpu"]["detail"].endswith("with fast products of bfloat16")
    assert (found["gpu"]["state"], found["compiler"]["state"]) == ("unused", "unused")
    assert "racdeploy-kernels" in found["compiler"]["detail"]


def test_a_name_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """No brackets or colons in it are taken for styles or pictures."""
    for show in (console.show, console.say):
        show("[bold]:smile:")
    assert [*capsys.readouterr()] == ["[bold]:smile:\n"] * 2

"""``inspect`` and ``doctor``: what is said last, and what is no failure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli import doctor
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


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores, products, memory, driver and compiler; what is not there can be done without."""
    monkeypatch.setattr(doctor, "free_bytes", lambda: 3 << 30)
    monkeypatch.setattr(doctor, "has_bfloat16", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    found = {each["what"]: each for each in doctor.examine()}
    assert found["memory"]["detail"] == "3.0 GiB free"
    assert found["cpu"]["detail"].endswith("with products of bfloat16")
    assert (found["gpu"]["state"], found["compiler"]["state"]) == ("unused", "unused")
    assert "that of racdeploy-kernels" in found["compiler"]["detail"]

"""Virtual environments in the cache: whole or not at all, ours alone, and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from racdeploy.cli import doctor
from racdeploy.cli.app import app
from racdeploy.errors import UsageError
from racdeploy.extras import SEPARATE
from racdeploy.files import ownership
from racdeploy.processes import child, environments
from tests.support.errors import raises
from tests.support.wheel import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


class Pip:
    """Runs that are recorded; ``broken`` are the ones that fail, by a word of theirs."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (word,) = {"venv", "pip", "-c"} & {*command}
        self.asked.append(word)
        if word in self.broken:
            return subprocess.CompletedProcess(command, 1, "", "looking\nno index\n")
        if word == "venv":
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.unlink(missing_ok=True)
            python.symlink_to(sys.executable)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A cache of its own, and no pip."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Pip()
    monkeypatch.setattr(environments.subprocess, "run", made)
    return made


def test_an_environment_is_made_once(pip: Pip) -> None:
    """What it installs is said before; its folder lets nobody else in."""
    said: list[str] = []
    assert environments.find("optimum") is None
    python = environments.make("optimum", said.append)
    assert environments.find("optimum") == python
    assert python.parents[1].stat().st_mode & 0o077 == 0
    assert "installing optimum-onnx>=0.1,<0.2, transformers>=4.51,<4.58" in said[1]

    environments.make("optimum", said.append)
    assert pip.asked == ["venv", "pip", "-c"]
    assert said[-1] == "optimum is set up already"


@pytest.mark.parametrize("broken", ["venv", "pip", "-c"])
def test_a_failed_one_is_resumed(pip: Pip, broken: str) -> None:
    """Nothing finds it before it is whole, and what it holds stays; pip's last line is told."""
    pip.broken = {broken}
    with raises("environment-not-made", "no index"):
        environments.make("optimum", print)
    assert environments.find("optimum") is None
    (partial,) = environments.cache_folder("environments").iterdir()
    (partial / "installed").touch()

    pip.broken = set()
    python = environments.make("optimum", print)
    assert python.is_file()
    assert (python.parents[1] / "installed").is_file()
    assert [each.name for each in python.parents[2].iterdir()] == [python.parents[1].name]


def test_what_others_may_write_into_is_neither_made_nor_run(
    pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's Python would run as this user."""
    python = environments.make("optimum", print)
    monkeypatch.setattr(ownership, "explain_foreign", lambda folder: "other users may write")
    with raises("folder-not-private", "other users may write"):
        environments.find("optimum")
    (finding,) = [each for each in doctor.examine() if each["what"] == "environment of optimum"]
    assert finding["state"] == "missing"

    python.unlink()
    asked = len(pip.asked)
    with raises("folder-not-private", "other users may write"):
        environments.make("optimum", print)
    assert len(pip.asked) == asked


def test_other_ranges_are_another_environment(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of racdeploy does not run with what an older one asked for."""
    environments.make("optimum", print)
    other = environments.SEPARATE["optimum"].__class__(("optimum-onnx>=0.2",), "optimum", "")
    monkeypatch.setitem(environments.SEPARATE, "optimum", other)
    assert environments.find("optimum") is None


def test_doctor_sets_it_up_and_lists_it(pip: Pip) -> None:
    """An unknown name says which there are."""
    (finding,) = [each for each in doctor.examine() if each["what"] == "environment of optimum"]
    assert finding["state"] == "unused"
    assert "racdeploy doctor --setup optimum" in finding["detail"]

    done = CliRunner().invoke(app, ["doctor", "--setup", "optimum", "--json"])
    folder = json.loads(done.stdout)["environment"]
    (finding,) = [each for each in doctor.examine() if each["what"] == "environment of optimum"]
    assert (finding["state"], finding["detail"]) == ("ok", folder)

    wrong = CliRunner().invoke(app, ["doctor", "--setup", "optimun"])
    assert wrong.exit_code == UsageError.exit_code
    assert "did you mean 'optimum'" in wrong.stderr


def test_its_ranges_are_those_of_the_extras() -> None:
    """What is installed on its own is what an extra would install."""
    lines = {*EXTRAS["dependencies"]}
    for extra in EXTRAS["optional-dependencies"].values():
        lines |= {*extra}
    known: dict[str, list[str]] = {}
    for line in lines:
        asked = Requirement(line)
        known.setdefault(asked.name, []).append(str(asked.specifier))

    for line in SEPARATE["optimum"].requirements:
        asked = Requirement(line)
        assert str(asked.specifier) in known[asked.name], line


def test_another_python_imports_racdeploy_from_here_and_nothing_else(tmp_path: Path) -> None:
    """Packages beside racdeploy are of versions that the other environment has not."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = next(environment.glob("lib/*/site-packages"))
    (site / "probe.py").write_text(
        "import json, importlib.util as u, racdeploy\n"
        "print(json.dumps([bool(u.find_spec('numpy')), racdeploy.__file__]))\n"
    )
    outcome = child.run_module("probe", python=environment / "bin" / "python")
    assert outcome.failure == ""
    has_numpy, file = outcome.value
    assert not has_numpy
    assert Path(file).name == "__init__.py"

"""One file is a plugin: one more of every kind, in a copy of the package.

Each is listed by ``racdeploy plugins``, runs through the contract of its kind, and is used through
the product's own doors. The files are in tests/support/one_more/, a folder for each kind. What a
contract needs beside the plugin (an engine's tiny model, a scorer's cases) is data of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from racdeploy import plugins

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests" / "support" / "one_more").glob("*/*.py"))
ONE_MORE = {file.parent.name: file for file in FILES}
CONTRACT_DATA = {
    "tests/contracts/test_scorers.py": (
        "CASES: dict[str, list[Case]] = {",
        '    "last_word": [("It is Rome.", "rome", True, "Rome", "last word"),\n'
        '                  ("Rome it is", "Rome", False, "is", "last word"),\n'
        '                  (" ", "one", False, None, "no text")],',
    ),
    "tests/contracts/test_harnesses.py": (
        "WRITTEN: dict[str, Callable[[Path], None]] = {",
        '    "tally": lambda out: (out / "tally.json").write_text(json.dumps({"sums": FIGURES})),',
    ),
    "tests/support/tiny_artifacts.py": (
        "ARTIFACTS: dict[str, Callable[[Path], AbstractContextManager[Path | str]]] = {",
        '    "serial": lambda folder: nullcontext(make_gguf(folder)),',
    ),
}
USED = {
    "tasks": ["remainder", True],
    "scorers": [True, False],
    "families": True,
    "quant": True,
    "presets": ["q5_0", "q8_0"],
    "packing": ["twin", True],
    "engines": 4,
    "structures": [[32, 32], [64, 64]],
    "criteria": [32, 32],
    "recover_methods": [True, True],
    "objectives": [True, True],
    "prune_methods": [0.5, 0.5],
    "formats": ["gguf_twin/tiny.gguf", [6, 512]],
    "onnx_exporters": True,
    "checks": "pass",
    "harnesses": [-0.5, "sums"],
}
"""What tests/support/one_more/use.py prints, but for the allocation."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with one more file in each plugin folder, and nothing else changed in it."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("racdeploy", "tests", "targets"):
        shutil.copytree(ROOT / name, root / name)  # with bytecode, which keeps its times
    shutil.copy(ROOT / "pyproject.toml", root)

    for kind, file in ONE_MORE.items():
        folder = root / plugins.KINDS[kind].replace(".", "/")
        taken = f"racdeploy has {file.name} itself: let {file.relative_to(ROOT)} be another example"
        assert not (folder / file.name).exists(), taken
        shutil.copy(file, folder)
    for name, (line, data) in CONTRACT_DATA.items():
        text = (root / name).read_text(encoding="utf-8")
        assert text.count(line) == 1, name
        (root / name).write_text(text.replace(line, f"{line}\n{data}"), encoding="utf-8")
    return root


def run_python(copy: Path, *arguments: str) -> str:
    """Run Python on the copy; return what it prints."""
    # The second process finds what the first one compiled; other plugins of pytest take a second.
    quick = {"PYTHONDONTWRITEBYTECODE": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **quick, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_there_is_one_more_of_every_kind() -> None:
    """A new kind of plugin needs an example here."""
    assert set(ONE_MORE) == set(plugins.KINDS)
    assert not any(file.stem in plugins.list_names(kind) for kind, file in ONE_MORE.items())


def test_each_is_listed(copy: Path) -> None:
    """``racdeploy plugins`` lists what the folders hold: all that was there, and the new file."""
    listed = json.loads(run_python(copy, "-m", "racdeploy", "plugins", "--json"))
    for kind, file in ONE_MORE.items():
        assert sorted([*plugins.list_names(kind), file.stem]) == sorted(_names(listed[kind])), kind


BOTH = """
import pytest, runpy, sys
if code := pytest.main(sys.argv[2:]):
    sys.exit(code)
runpy.run_module("tests.support.one_more.use", run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the contracts and then the product's doors print, in a process that has torch once."""
    named = " or ".join([*(file.stem for file in FILES), "every_plugin_imports"])
    chosen = f"({named}) and not killed_it_resumes"  # its server would import torch once more
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, "--junitxml", "contracts.xml"]
    options += ["tests/contracts", "tests/test_private.py"]
    return run_python(copy, "-c", BOTH, str(tmp_path_factory.mktemp("used")), *options)


@pytest.mark.usefixtures("printed")
def test_each_runs_through_its_contract(copy: Path) -> None:
    """The contracts find the new files by themselves, and all tests of theirs pass."""
    cases = ElementTree.parse(copy / "contracts.xml").iter("testcase")
    passed = [
        case.get("name", "")
        for case in cases
        if not {child.tag for child in case} & {"failure", "error", "skipped"}
    ]
    for file in FILES:
        assert any(file.stem in name for name in passed), file.stem


def test_each_is_used(printed: str) -> None:
    """Drawn, scored, exported, packed, pruned, run and verified through the product's doors."""
    used: Mapping[str, Any] = json.loads(printed.splitlines()[-1])
    lowest, highest = used["allocations"]
    assert lowest < 0.5 < highest
    assert {kind: used[kind] for kind in USED} == USED


def _names(listed: list[Any]) -> list[str]:
    return [entry["name"] if isinstance(entry, dict) else entry for entry in listed]

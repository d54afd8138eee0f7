"""An underscore means private to the module, and a plugin folder holds plugins and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import racdeploy
from racdeploy import plugins
from racdeploy.errors import MissingExtraError

ROOT = Path(racdeploy.__file__).parent
LOOSE_MODULES = 9
MEMBERS: dict[str, tuple[set[str], ...]] = {
    "tasks": ({"draw"}, {"read"}, {"open_generator"}, {"DATASET", "make_problem"}),
    "scorers": ({"score"},),
    "families": ({"FAMILY"},),
    "quant": ({"QUANT"},),
    "presets": ({"PRESET"},),
    "packing": ({"FORMATS", "REQUIRES_ZEROS", "KEEPS_PLAIN_FILE", "reason_for_plain"},),
    "engines": ({"open_engine"},),
    "structures": ({"SCOPE", "SIZE_LETTER", "layout", "check"},),
    "criteria": ({"USES_TRACES", "remove_units"},),
    "recover_methods": ({"peak_bytes", "recover"},),
    "objectives": ({"OBJECTIVE"},),
    "prune_methods": ({"prune"},),
    "allocations": ({"NEEDS_SURVEY", "allocate"},),
    "formats": ({"BACKEND", "export", "measure"},),
    "onnx_exporters": ({"unsupported_reason", "build"},),
    "checks": ({"check"},),
    "harnesses": ({"PACKAGE", "INSTALL", "arguments", "read"},),
}
"""What each kind's plugins must have; of several sets one is enough."""
PLUGINS = [(kind, name) for kind in plugins.KINDS for name in plugins.list_names(kind)]


@pytest.mark.parametrize(("kind", "name"), PLUGINS, ids=lambda part: str(part))
def test_everything_in_a_plugin_folder_is_a_plugin(kind: str, name: str) -> None:
    """Support stands elsewhere: whatever lies in the folder has the members of its kind."""
    try:
        found = set(dir(plugins.load(kind, name)))
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert any(members <= found for members in MEMBERS[kind])


def test_nothing_private_is_imported_from_another_module() -> None:
    """No ``from racdeploy.x import _y``, no ``racdeploy._x``, and no ``x._y`` of a module ``x``."""
    wrong = [f"{file.relative_to(ROOT)}:{found}" for file in _files() for found in _reaches(file)]
    assert not wrong, "\n".join(wrong)


def test_what_reaches_for_something_private_is_found(tmp_path: Path) -> None:
    """A spoiled file: each way to take what is private, and none that is allowed."""
    file = tmp_path / "spoiled.py"
    file.write_text(
        "from racdeploy._hidden import thing\n"
        "from racdeploy.files import writing, _child\n"
        "from racdeploy.files.writing import _sync\n"
        "from racdeploy import __version__\n"
        "writing._sync()\n"
        "self._sync()\n"
    )
    assert [found.partition(" ")[0] for found in _reaches(file)] == ["1", "2", "3", "5"]


def test_no_test_imports_another() -> None:
    """What two need is in tests/support: a test that is moved or left out breaks no other."""
    tests = Path(__file__).parent
    wrong = [
        f"{file.relative_to(tests)}: {module}"
        for file in sorted(tests.rglob("test_*.py"))
        for module in _imported_modules(file)
        if module.startswith("tests.") and ".test_" in module
    ]
    assert not wrong, "\n".join(wrong)


def _imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_few_modules_stand_loose() -> None:
    """What is not in a room is the ground that every room stands on."""
    loose = sorted(file.name for file in ROOT.glob("*.py") if not file.name.startswith("__"))
    assert len(loose) <= LOOSE_MODULES, loose


def _files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def _reaches(file: Path) -> Iterator[str]:
    """Return where a file takes something private from another module of racdeploy."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules: set[str] = set()

    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("racdeploy"):
            continue
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        if any(_is_private(name) for name in names):
            yield f"{node.lineno} imports {node.module} {', '.join(names[-len(node.names) :])}"
        modules |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}

    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in modules and _is_private(node.attr):
            yield f"{node.lineno} uses {node.value.id}.{node.attr}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")

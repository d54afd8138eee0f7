"""Print the files of ``make test-more`` that a change reaches: ``python -m tests.support.reached``.

A test file reaches what it imports, and what that imports in turn, also within functions and by the
name of a plugin, as :mod:`racdeploy.files.code_hashes` finds it for a stage. The change is that of
:func:`tests.support.room_lines.find_base`, as for ``make fuzz-changed``.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

from racdeploy.files.code_hashes import reachable_files
from tests.fuzz.changed import find_changed_files

ROOT = Path(__file__).parents[2]
FOR_ALL = ("pyproject.toml", "requirements/", "tests/conftest.py")
"""What every test hangs on."""
_MARKS = ("mark.more", "tests.support.more")
_TARGETS = "racdeploy/targets.py"


def select_files(changed: Collection[str]) -> list[str]:
    """Return the test files with tests of ``make test-more`` that reach a changed file."""
    files = [
        file
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(mark in file.read_text(encoding="utf-8") for mark in _MARKS)
    ]
    names = [file.relative_to(ROOT).as_posix() for file in files]
    if any(name.startswith(FOR_ALL) for name in changed):
        return names
    return [name for name in names if not list_reached(name).isdisjoint(changed)]


def list_reached(test_file: str) -> set[str]:
    """Return the files that a test file reaches, and itself."""
    modules = set[str]()
    reached = set[str]()
    pending = [ROOT / test_file, *_list_conftests(ROOT / test_file)]

    while pending:
        file = pending.pop()
        name = file.relative_to(ROOT).as_posix()
        if name in reached:
            continue

        reached.add(name)
        for module in _list_imports(file):
            support = ROOT / f"{module.replace('.', '/')}.py"
            if module.startswith("tests.") and support.is_file():
                pending.append(support)
            elif module.startswith("racdeploy."):
                modules.add(module)

    reached |= {file.relative_to(ROOT).as_posix() for file in reachable_files(sorted(modules))}
    if _TARGETS in reached:
        reached |= {file.relative_to(ROOT).as_posix() for file in (ROOT / "targets").iterdir()}
    return reached


def _list_conftests(test_file: Path) -> Iterator[Path]:
    for folder in test_file.relative_to(ROOT / "tests").parents[:-1]:
        if (conftest := ROOT / "tests" / folder / "conftest.py").is_file():
            yield conftest


def _list_imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), names=aliases):
                yield module
                yield from (f"{module}.{alias.name}" for alias in aliases)


if __name__ == "__main__":
    print("\n".join(select_files(find_changed_files(ROOT))))

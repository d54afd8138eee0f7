"""The import ladder of ARCHITECTURE.md: a unit imports only lower rungs."""

from __future__ import annotations

import ast
from pathlib import Path

import racdeploy
from tests.support.architecture import read_fenced, read_ladder

ROOT = Path(racdeploy.__file__).parent
LADDER = read_ladder()
RUNG = {unit: number for number, rung in enumerate(LADDER) for unit in rung}
TORCH_UNITS = read_fenced("torch")
HEAVY = {"torch", "transformers", "optimum", "safetensors"}


def _imports(file: Path) -> set[str]:
    """Return the dotted names a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            if node.module == "racdeploy":
                names |= {f"racdeploy.{alias.name}" for alias in node.names}
    return names


def _unit(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_units_import_only_lower_rungs() -> None:
    """Neither upwards nor sideways; the package's own __init__ only forwards names."""
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        unit = _unit(file)
        if unit == "__init__":
            continue
        for name in _imports(file):
            parts = name.split(".")
            if (
                parts[0] != "racdeploy"
                or len(parts) < 2
                or parts[1] not in RUNG
                or parts[1] == unit
            ):
                continue
            if RUNG[parts[1]] >= RUNG[unit]:
                wrong.append(f"{file.relative_to(ROOT)} imports {parts[1]}")
    assert not wrong, "\n".join(wrong)


def test_work_asks_its_share_and_not_the_process_group() -> None:
    """Who joins a job, builds and opens workspaces has the group; all others have a share."""
    group = "racdeploy.pruning.process_group"
    knowing = {
        file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.py") if group in _imports(file)
    }
    assert knowing == {
        "api/builds.py",
        "pipeline/build.py",
        "pipeline/workspace.py",
        "pruning/job_share.py",
    }


def test_every_unit_has_a_rung() -> None:
    """A new file or folder is placed on the ladder on purpose."""
    units = {_unit(file) for file in ROOT.rglob("*.py")} - {"__init__"}
    assert units <= set(RUNG)


def test_torch_stays_where_it_belongs() -> None:
    """Torch and transformers are imported only where ARCHITECTURE.md says."""
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT).as_posix()
        if any(place.startswith(unit) for unit in TORCH_UNITS):
            continue
        found = {name.partition(".")[0] for name in _imports(file)} & HEAVY
        assert not found, f"{place} imports {found}"

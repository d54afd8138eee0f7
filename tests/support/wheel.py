"""Build what is published, and install it where nothing but the base install is found."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
"""This process's environment, without a PYTHONPATH that leads to the repository."""


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    out: str
    err: str


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """Return the wheel and the sdist of a source folder; the wheel is made of the sdist.

    Without isolation: hatchling and its plugins are those of this environment.
    """
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert done.code == 0, done.out + done.err
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def install(wheel: Path, folder: Path, *others: Path, packages: Sequence[str] = ()) -> Path:
    """Install a wheel where only its base dependencies are found; return the folder of programs.

    These are links to the packages of this environment, so they are not downloaded again, and the
    packages of extras are not there. Whether the index has versions that fit is not shown by it.

    Args:
        others: wheels that need nothing.
        packages: names of more packages to link, with what they need.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    (place,) = folder.glob("lib/python*/site-packages")

    for name in _names_needed([*_requirements_of(wheel), *packages], set()):
        _link(distribution(name), place)

    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "--disable-pip-version-check",
    )
    done = run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, *others)
    assert done.code == 0, done.err
    return programs


def run(*command: object, cwd: Path | None = None, **variables: str) -> Done:
    """Run a program to its end, outside the repository unless a folder is named."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=CLEAN | variables,
        timeout=600,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def _requirements_of(wheel: Path) -> list[str]:
    import zipfile
    from email import message_from_bytes

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []


def _names_needed(requirements: list[str], found: set[str]) -> set[str]:
    """Return the packages that requirements without an extra need, and those that these need."""
    for text in requirements:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in found:
            found.add(requirement.name)
            _names_needed(distribution(requirement.name).requires or [], found)
    return found


def _link(package: Distribution, folder: Path) -> None:
    places = {
        file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")
    }
    for place in places:
        target = folder / place
        if not target.exists():
            target.symlink_to(Path(str(package.locate_file(place))))

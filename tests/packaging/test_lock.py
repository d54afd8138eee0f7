"""The lock of ``make test``: all that the tests need, at versions that fit, each with its hash."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import lock
from tests.support.lock import normal, read
from tests.support.wheel import ROOT, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
FILES = (lock.LOCK, lock.PIP)
ENVIRONMENT = {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64"}


def _expand(extra: str) -> Iterator[Requirement]:
    """Yield what an extra asks for; extras of racdeploy's own in it are followed."""
    for line in EXTRAS[extra]:
        asked = Requirement(line)
        if asked.name == "racdeploy":
            for inner in sorted(asked.extras):
                yield from _expand(inner)
        else:
            yield asked


ASKED = [
    *map(Requirement, PROJECT["project"]["dependencies"]),
    *map(Requirement, PROJECT["build-system"]["requires"]),
    *_expand("dev"),
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_every_requirement_is_locked_at_a_version_that_fits(asked: Requirement) -> None:
    """What is installed by range alone is named, with its reason, in tests/support/lock.py."""
    name = normal(asked.name)
    if lock.UNLOCKED.get(name):
        assert name not in read()
        return

    assert name in read(), f"{asked} is not locked: python -m tests.support.lock"
    assert asked.specifier.contains(read()[name].version, prereleases=True), asked


def test_what_is_locked_needs_nothing_else() -> None:
    """The packages that the locked ones ask for are locked, too, as far as they are installed."""
    locked, missing = read(), []
    for name, entry in locked.items():
        try:
            lines = requires(name) if version(name) == entry.version else None
        except PackageNotFoundError:
            continue  # an environment that was not made by `make test`

        for needed in map(Requirement, lines or ()):
            marker = needed.marker
            needs_it = marker is None or marker.evaluate({**ENVIRONMENT, "extra": ""})
            if needs_it and normal(needed.name) not in {*locked, *lock.UNLOCKED}:
                missing.append(f"{name} needs {needed}")
    assert missing == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_entry_has_a_hash_and_no_address(file: Path) -> None:
    """An index is the machine's own: none is named."""
    entries = read(file)
    assert entries
    assert [name for name, entry in entries.items() if not entry.hashes] == []
    assert not re.search(r"//|^\s*-(?!-hash=)", file.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(
    "line", ["torch>=2.5", "./folder", "name @ file:///x", "-e .", "a==1 --hash=md5:00"]
)
def test_an_entry_that_pins_nothing_is_noticed(tmp_path: Path, line: str) -> None:
    """The reader behind the tests above knows one form."""
    file = tmp_path / "locked.txt"
    file.write_text(f"# what\nnumpy==1.0 \\\n    --hash=sha256:{'0' * 64}\n{line}\n")
    with pytest.raises(AssertionError, match="pins nothing"):
        read(file)


@pytest.mark.parametrize(
    ("machine", "fits"),
    [
        (("CPython", "3.11.9", "Linux", "x86_64", "glibc 2.36"), True),
        (("CPython", "3.12.1", "Linux", "x86_64", "glibc 2.36"), False),
        (("PyPy", "3.11.9", "Linux", "x86_64", "glibc 2.36"), False),
        (("CPython", "3.11.9", "Darwin", "arm64", None), False),
        (("CPython", "3.11.9", "Linux", "aarch64", "glibc 2.36"), False),
        (("CPython", "3.11.9", "Linux", "x86_64", "glibc 2.31"), False),
        (("CPython", "3.11.9", "Linux", "x86_64", None), False),
    ],
)
def test_other_machines_are_told_and_take_ranges(
    monkeypatch: pytest.MonkeyPatch, machine: tuple[str, str, str, str, str | None], fits: bool
) -> None:
    """The Makefile asks this, and its message is the one line that a user sees."""
    python, number, system, processor, library = machine
    monkeypatch.setattr(lock.platform, "python_implementation", lambda: python)
    monkeypatch.setattr(lock.platform, "python_version_tuple", lambda: tuple(number.split(".")))
    monkeypatch.setattr(lock.platform, "system", lambda: system)
    monkeypatch.setattr(lock.platform, "machine", lambda: processor)
    monkeypatch.setattr(lock.os, "confstr", lambda _: library)
    monkeypatch.setattr(sys, "argv", ["lock", "fits"])

    with pytest.raises(SystemExit) as ended:
        lock.main()
    assert (not ended.value.code) == fits
    assert fits or "versions by range" in str(ended.value.code)


@pytest.mark.parametrize(
    ("arguments", "installs"),
    [
        ((), "--no-deps --require-hashes --requirement requirements/locked.txt"),
        (("LOCK=",), "--quiet --editable '.[dev]'"),
    ],
)
def test_make_test_installs_the_lock_unless_told_otherwise(
    tmp_path: Path, arguments: tuple[str, ...], installs: str
) -> None:
    """What make would run, without running it, in a folder that has no environment yet."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")

    planned = run("make", "--dry-run", "-C", tmp_path, "test", *arguments)
    assert planned.code == 0, planned.err
    assert installs in planned.out
    pip = "--upgrade pip" if arguments else "--requirement requirements/pip.txt"
    assert pip in planned.out

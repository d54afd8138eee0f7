"""The extras: what pip installs together, and which of them caps transformers."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from racdeploy.extras import PACKAGES, Package
from tests.support.wheel import ROOT, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
BROUGHT = {"lm-eval": {"langdetect"}}
"""What a package with an extra of its own brings."""


def _expand(extra: str) -> set[str]:
    """Return the extras that one asks for, itself included."""
    found = {extra}
    for asked in map(Requirement, EXTRAS[extra]):
        if asked.name == "racdeploy":
            for inner in asked.extras:
                found |= _expand(inner)
    return found


def test_only_the_extra_that_needs_it_holds_transformers_back() -> None:
    """Everything else goes with any transformers, the development environment with the newest."""
    capped = set()
    for extra, lines in EXTRAS.items():
        for asked in map(Requirement, lines):
            if asked.name in {"transformers", "onnxruntime-genai"} and "99" not in asked.specifier:
                capped.add(extra)

    assert capped == {"optimum"}
    assert "optimum" not in _expand("all") | _expand("dev")
    assert {"all", "test"} < _expand("dev")


@pytest.mark.parametrize("package", PACKAGES.values(), ids=lambda package: package.name)
def test_a_hint_names_an_extra_that_brings_the_package(package: Package) -> None:
    """What doctor and errors say is what pip does."""
    brought = set()
    for extra in _expand(package.extra):
        for asked in map(Requirement, EXTRAS[extra]):
            brought |= {asked.name.lower(), *BROUGHT.get(asked.name, ())}
    assert package.name.lower() in brought


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extras", "expected"),
    [
        ("all", {"transformers": "5", "onnxruntime-genai": "0.16", "onnxscript": "0.7"}),
        (
            "all,optimum",
            {"transformers": "4.57", "onnxruntime-genai": "0.15", "optimum-onnx": "0.1"},
        ),
        ("dev", {"transformers": "5", "onnxruntime-genai": "0.16", "onnxscript": "0.7"}),
    ],
)
def test_pip_finds_versions_that_go_together(
    extras: str, expected: dict[str, str], tmp_path: Path
) -> None:
    """The newest of each set; nothing is installed."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    probe = run(*pip, "download", "--no-deps", "--dest", tmp_path, "packaging")
    if probe.code:
        pytest.skip("pip reaches no index")

    report = tmp_path / "report.json"
    options = ("--dry-run", "--ignore-installed", "--report", report)
    done = run(*pip, "install", *options, f"{ROOT}[{extras}]")
    assert done.code == 0, done.err

    entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    packages = [entry["metadata"] for entry in entries]
    found = {package["name"].lower(): Version(package["version"]) for package in packages}

    for name, least in expected.items():
        assert found[name] >= Version(least), name

    is_held = "optimum" in extras
    assert ("optimum-onnx" in found) == is_held
    assert (found["transformers"] < Version("4.58")) == is_held
    assert (found["onnxruntime-genai"] < Version("0.16")) == is_held

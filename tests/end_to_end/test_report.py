"""``racdeploy report`` as it is typed: the page of a bundle, in a browser or as a path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from racdeploy.report.files import PAGE, write_reports
from tests.support.commands import environment, racdeploy, racdeploy_alone
from tests.support.sample_report import build_records, build_report

# What a base install does not have.
EXTRAS = ("torch", "transformers", "optimum", "llama_cpp", "onnxruntime", "onnx", "gguf")


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """What ``verify --reports`` writes."""
    folder = tmp_path / "my reports"
    write_reports(folder, build_report(), build_records(), "bundle")
    return folder


@pytest.fixture
def browser(tmp_path: Path) -> Path:
    """A browser that writes down what it is asked to open."""
    program = tmp_path / "browser"
    program.write_text(f"#!/bin/sh\necho \"$1\" > '{tmp_path}/opened'\n")
    program.chmod(0o755)
    return program


def test_the_page_of_a_bundle_is_found(built: Path) -> None:
    """Where there is no display its path is printed, and nothing is opened or changed."""
    before = (built / PAGE).read_bytes()
    outcome = racdeploy("report", built, DISPLAY="", WAYLAND_DISPLAY="")
    assert (outcome.code, outcome.out.strip()) == (0, str(built / PAGE))
    assert outcome.err == "PASS: tiny-reasoner for ci-smoke, bytes 1.00 of dense q8_0\n"
    assert (built / PAGE).read_bytes() == before
    assert f"racdeploy run {built.name} " in before.decode()


def test_the_browser_is_asked_for_the_page(reports: Path, browser: Path) -> None:
    """By its address, spaces and all."""
    outcome = racdeploy_alone("report", reports, "--open", BROWSER=f"{browser} %s")
    assert outcome.code == 0, outcome.err
    opened = (browser.parent / "opened").read_text().strip()
    assert opened == (reports / PAGE).as_uri()
    assert "my%20reports" in opened


def test_a_display_opens_it_without_being_asked(reports: Path, browser: Path) -> None:
    """And --no-open keeps it closed."""
    display = {"DISPLAY": ":7", "BROWSER": f"{browser} %s"}
    assert racdeploy_alone("report", reports, "--no-open", **display).code == 0
    assert not (browser.parent / "opened").exists()
    found = json.loads(racdeploy_alone("report", reports, "--json", **display).out)
    assert found == {"page": str(reports / PAGE), "verdict": "pass", "opened": True}
    assert (browser.parent / "opened").exists()


def test_a_missing_page_is_written_by_a_base_install(reports: Path) -> None:
    """From report.json and records.jsonl, without any engine; the same page as before, but for the
    folder in its command.
    """
    page = (reports / PAGE).read_text(encoding="utf-8")
    (reports / PAGE).unlink()
    call = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}));"
        "import racdeploy.cli; racdeploy.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", call, "report", str(reports), "--no-open"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    again = (reports / PAGE).read_text(encoding="utf-8")
    assert again.replace("run &#39;my reports&#39; ", "run bundle ") == page


def test_line_ends_that_models_write_are_kept(reports: Path) -> None:
    """U+2028, U+0085 and a form feed in a thought are no ends of a record."""
    thought = "one\u2028two\u0085three\x0cfour"
    odd = [record.model_copy(update={"thinking_text": thought}) for record in build_records()]
    write_reports(reports, build_report(), odd)
    (reports / PAGE).unlink()
    outcome = racdeploy("report", reports, "--no-open")
    assert outcome.code == 0, outcome.err
    assert "one\\u2028two" in (reports / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: None, "no-report"),
        (lambda folder: folder.rmdir(), "no-report"),
        (lambda folder: (folder / "report.json").write_text("{}"), "damaged-report"),
    ],
)
def test_a_folder_without_a_report_is_refused(tmp_path: Path, spoil: object, code: str) -> None:
    """With what to give instead, and no file left behind."""
    folder = tmp_path / "empty"
    folder.mkdir()
    assert callable(spoil)
    spoil(folder)
    outcome = racdeploy("report", folder)
    assert (outcome.code, outcome.error_code) == (2, code)
    assert "→" in outcome.err
    assert not (folder / PAGE).exists()

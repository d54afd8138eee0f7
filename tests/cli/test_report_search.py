"""``racdeploy report tune.json``: the page is drawn again, the figures are printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.report.tuning_files import FILE, PAGE, write_tuning
from tests.support.commands import find_error_code
from tests.support.sample_tuning import build_tuning


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tuning(tmp_path, build_tuning())
    (tmp_path / PAGE).write_text("of an older version")
    return tmp_path / FILE


def test_a_search_is_printed_and_its_page_drawn_again(file: Path) -> None:
    """The path alone on stdout, tables and verdict on stderr; the page in the bundle stays."""
    done = CliRunner().invoke(app, ["report", str(file), "--no-open"])
    assert done.exit_code == 0, done.output
    page = Path(done.stdout.strip())
    assert page.read_text().startswith("<!doctype html>")
    assert file.with_name(PAGE).read_text() == "of an older version" != page.read_text()


def test_a_search_as_json_has_page_and_verdict(file: Path) -> None:
    """The page in the bundle, where it is that of this search."""
    write_tuning(file.parent, build_tuning())
    done = CliRunner().invoke(app, ["report", str(file), "--no-open", "--json"])
    found = json.loads(done.stdout)
    assert found == {
        "page": str(file.with_name(PAGE).resolve()),
        "verdict": build_tuning().verdict,
        "opened": False,
    }


def test_another_file_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """Exit code 2 and a remedy."""
    file = tmp_path / "other.json"
    file.write_text('{"winner": "me"}')
    done = CliRunner().invoke(app, ["report", str(file), "--no-open"])
    assert (done.exit_code, find_error_code(done.output)) == (2, "damaged-report")
    assert "→" in done.output
    assert [each.name for each in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("winner", "nobody", "'nobody'"),
        ("gain", {"value": 0.5, "lower": 0.1, "upper": 0.4}, "gain: "),
        ("gain", {"value": "NaN", "lower": 0, "upper": 1}, "gain.value: "),
    ],
)
def test_figures_that_cannot_be_are_refused(
    key: str, value: object, said: str, tmp_path: Path
) -> None:
    """With their place, where they have one: a page of them would say nothing."""
    values = json.loads(build_tuning().model_dump_json()) | {key: value}
    file = tmp_path / FILE
    file.write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["report", str(file), "--no-open"])
    assert (done.exit_code, find_error_code(done.output)) == (2, "damaged-report")
    assert said in " ".join(done.output.split())

"""The site of the documents: it builds without a warning and without a network, and asks nobody."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer.main

from racdeploy import errors
from racdeploy.cli.app import app

ROOT = Path(__file__).parents[2]
NO_NETWORK = """
import socket
def refuse(*_):
    raise OSError("the site is built without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder / "site"


class _Resources(HTMLParser):
    """What a browser loads for a page without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "iframe", "source", "audio", "video"):
            self.found.append(values.get("src", ""))
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(values.get("href", ""))


def _read(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text(encoding="utf-8")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """Neither fonts nor scripts nor pictures, and no count of stars."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        resources = _Resources()
        resources.feed(text)
        assert resources.found
        assert [each for each in resources.found if re.match(r"(https?:)?//", each)] == []
        assert 'data-md-component="source"' not in text

    for style in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text("utf-8"))
        assert found == []


def test_every_document_is_a_page(site: Path) -> None:
    """Also those that the repository has outside docs/; each is in the navigation of the first."""
    start = (site / "index.html").read_text(encoding="utf-8")
    names = {file.stem for file in (ROOT / "docs").glob("*.md")} - {"index"}
    for name in names | {"how-it-works", "contributing", "changelog", "results", "results-archive"}:
        assert f'href="{name}/"' in start, name


def test_the_reference_has_every_command(site: Path) -> None:
    """With all of its options."""
    text = _read(site, "reference/cli")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f'id="{name}"' in text or hasattr(command, "commands"), name
    assert "--recover-tokens" in text
    assert 'id="cache-rm"' in text


def test_the_reference_has_the_public_names(site: Path) -> None:
    """Functions with their parameters, and every error."""
    text = _read(site, "reference/api")
    for name in (
        "loading.load",
        "model.Model.generate",
        "model.GenerationResult",
        "streams.TextStream",
    ):
        assert f'id="racdeploy.runtime.{name}"' in text
    raised = [name for name in vars(errors) if name.endswith(("Error", "Failure"))]
    assert len(raised) > 8
    for name in raised:
        assert f'id="racdeploy.errors.{name}"' in text
    assert ":class:" not in text


def test_links_out_of_the_documents_lead_into_the_repository(site: Path) -> None:
    """A file that is no page is one that is there."""
    found = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"github\.com/racdeploy/racdeploy/blob/main/([^\"#]+)", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
            found += 1
    assert found > 20

"""What the documents list is what the code has, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from racdeploy import plugins

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
)
LISTING = [file for file in (ARCHITECTURE, ROOT / "README.md") if file.is_file()]


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _listed_plugins(text: str) -> dict[str, list[str]]:
    """Return the plugins between the markers: on each line the kind first, then its names, whatever the markup."""
    (listing,) = re.findall(r"<!-- plugins -->(.*?)<!-- /plugins -->", text, re.DOTALL)
    lines = [re.findall(r"\w+", line) for line in listing.splitlines()]
    return {words[0]: words[1:] for words in lines if words and words[0] in plugins.KINDS}


@pytest.mark.parametrize("file", LISTING, ids=_name)
def test_the_listed_plugins_are_the_installed_ones(file: Path) -> None:
    """A document lists what ``racdeploy plugins`` prints."""
    installed = {kind: list(plugins.names(kind)) for kind in plugins.KINDS}
    assert installed == _listed_plugins(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", DOCUMENTS, ids=_name)
def test_relative_links_lead_to_files(file: Path) -> None:
    """No document points at something that is not there."""
    prose = re.sub(
        r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in local if not (file.parent / link).exists()] == []

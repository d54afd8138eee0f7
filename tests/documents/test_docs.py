"""What the documents list is what the code has, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from racdeploy import plugins
from tests.support.documents import FILES, rewrite

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
FOLDERS = [ROOT / name for name in ("benchmarks", "docs", "examples")]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in folder.rglob("*.md"))]
)


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_the_listed_plugins_are_the_installed_ones() -> None:
    """ARCHITECTURE lists what ``racdeploy plugins`` prints."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    (listing,) = re.findall(r"<!-- plugins -->(.*?)<!-- /plugins -->", text, re.DOTALL)

    lines = [re.findall(r"\w+", line) for line in listing.splitlines()]
    listed = {words[0]: words[1:] for words in lines if words and words[0] in plugins.KINDS}
    assert listed == {kind: list(plugins.list_names(kind)) for kind in plugins.KINDS}


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_generated_parts_are_those_of_the_code(file: Path) -> None:
    """Tree, listing and examples: ``python -m tests.support.documents`` writes them again."""
    text = file.read_text(encoding="utf-8")
    assert text == rewrite(text), "run python -m tests.support.documents"


@pytest.mark.parametrize("file", DOCUMENTS, ids=_name)
def test_relative_links_lead_to_files(file: Path) -> None:
    """No document points at something that is not there."""
    assert [link for link in _local_links(file) if not _target(file, link).exists()] == []


@pytest.mark.parametrize("file", DOCUMENTS, ids=_name)
def test_links_into_a_page_lead_to_headings(file: Path) -> None:
    """What follows ``#`` is the heading of a section, as GitHub writes it."""
    anchored = [link for link in _local_links(file) if "#" in link]
    wrong = [
        link for link in anchored if link.partition("#")[2] not in _anchors(_target(file, link))
    ]
    assert wrong == []


def test_the_pictures_are_small_and_ask_no_server() -> None:
    """Below 200 kB each, a moving one 400, with words for those who do not see them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {ROOT / source for source in re.findall(r'(?:src|srcset)="([^"]+)"', text)}
    assert text.count("<img ") == len(re.findall(r'<img [^>]*alt="[^"]{20,}"', text)) == 2

    for guide in (ROOT / "docs").glob("*.md"):
        for words, source in re.findall(r"!\[(.*?)\]\((.*?)\)", guide.read_text(encoding="utf-8")):
            assert len(words) > 20
            shown.add(guide.parent / source)

    assert shown == set((ROOT / "docs" / "pictures").iterdir())
    for file in shown:
        is_drawn = file.suffix == ".svg"
        drawn = file.read_text(encoding="utf-8") if is_drawn else ""
        assert file.stat().st_size < (400_000 if "@keyframes" in drawn else 200_000)
        assert not re.search(r"url\(['\"]?http|href=\"[^#]|<script|@import", drawn)


def _local_links(file: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", _prose(file))
    return [link for link in links if not re.match(r"[a-z]+:", link)]


def _target(file: Path, link: str) -> Path:
    path = link.partition("#")[0]
    return file.parent / path if path else file


def _anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(file), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


def _prose(file: Path) -> str:
    """Return the text without its fenced blocks."""
    text = file.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)

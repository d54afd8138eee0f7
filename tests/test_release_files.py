"""Files that a release wrote are opened by every later racdeploy.

tests/references/release-VERSION is what that release wrote, and never changes. Where a schema
changes, the reader learns the new version beside the old one: docs/reference/files.md.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import racdeploy
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest
from racdeploy.packing.racgguf.container import Container
from racdeploy.recipe import Recipe
from racdeploy.report.files import read_records, read_report
from racdeploy.report.tuning_files import read_tuning
from racdeploy.runtime.conversation import Conversation
from racdeploy.verification.reference import Reference
from tests.support.commands import racdeploy as run
from tests.support.errors import raises

FOLDER = Path(__file__).parent / "references"
RELEASES = sorted(FOLDER.glob("release-*"))


@pytest.fixture(params=RELEASES, ids=lambda folder: folder.name)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a release wrote."""
    return Path(shutil.copytree(request.param, tmp_path / "release"))


def _read_recipe(folder: Path) -> Recipe:
    return Recipe.combine(folder / "recipe.toml", {})


def _read_search(folder: Path) -> object:
    return read_tuning(folder / "tune.json")


def _read_bundle(folder: Path) -> Manifest:
    return Manifest.read(folder / "bundle")


def _read_report(folder: Path) -> object:
    return read_report(folder / "bundle")


def _read_records(folder: Path) -> object:
    return read_records(folder / "bundle")


def _read_reference(folder: Path) -> Reference:
    return Reference.read(folder / "reference")


READERS: dict[str, Callable[[Path], object]] = {
    "recipe.toml": _read_recipe,
    "bundle/racdeploy.json": _read_bundle,
    "bundle/report.json": _read_report,
    "bundle/records.jsonl": _read_records,
    "reference/reference.json": _read_reference,
    "reference/records.jsonl": _read_reference,
    "tune.json": _read_search,
}


def test_a_recipe_keeps_its_keys(release: Path) -> None:
    """Those of the file, and all those of which the manifest has the values."""
    assert _read_recipe(release).verify.logit_traces == 1
    kept = _read_bundle(release).recipe
    assert Recipe.model_validate(kept).verify.max_new_tokens == kept["verify"]["max_new_tokens"]


def test_a_bundle_is_whole_and_reports_again(release: Path) -> None:
    """Its hashes hold, its records are those of its report, and its page is drawn again."""
    manifest = _read_bundle(release)
    manifest.check_files(release / "bundle")

    report, records = read_report(release / "bundle"), read_records(release / "bundle")
    assert len(records) == 2 * sum(row.prompts for row in report.tasks) > 0
    assert manifest.verdict == report.verdict == "inconclusive"

    drawn = run("report", release / "bundle", "--no-open")
    assert drawn.code == 0, drawn.err
    assert (release / "bundle" / "report.html").is_file()


def test_a_container_gives_its_plain_file_back(release: Path, tmp_path: Path) -> None:
    (packed,) = (release / "bundle").glob("*.racgguf")
    container = Container.open(packed)
    container.unpack(tmp_path / "plain.gguf")
    (entry,) = _read_bundle(release).artifacts
    assert file_sha256(tmp_path / "plain.gguf") == entry.unpacked_sha256


def test_a_reference_has_its_answers_and_logits(release: Path) -> None:
    reference = _read_reference(release)
    assert len(reference.arm.records) == 4
    assert len(reference.logits) == len(reference.traces) > 0


def test_a_search_has_its_winner(release: Path) -> None:
    assert read_tuning(release / "tune.json").winner


def test_a_model_answers_and_goes_on_with_a_conversation(release: Path) -> None:
    """On the engine, in the words of the conversation that was saved."""
    with racdeploy.load(release / "bundle") as model:
        talk = Conversation.load(model, release / "conversation.json")
        assert (talk.system, len(talk.turns)) == ("Be brief.", 1)
        assert talk.ask("And 4 plus 5?", max_new_tokens=4).finish_reason == "length"


@pytest.mark.parametrize("name", READERS)
def test_a_newer_schema_is_one_error_that_names_its_writer(release: Path, name: str) -> None:
    """Whatever else changed with it: no list of keys that nobody knows yet."""
    file = release / name
    newer = re.sub(r'("?schema_version"?(?: = |: ?))\d+', r"\g<1>77", file.read_text("utf-8"))
    newer = re.sub(r'("racdeploy(?:_version)?": ?)"0.1.0"', r'\1"7.5.0"', newer)
    file.write_text(newer.replace("prompt", "asked"), encoding="utf-8")

    writer = "another release" if name.endswith(("toml", "jsonl")) else "racdeploy 7.5.0"
    with raises("unknown-schema-version", "77", writer, racdeploy.__version__):
        READERS[name](release)


def test_what_a_release_wrote_says_its_version(release: Path) -> None:
    """Each file, and each line of records."""
    for name in READERS:
        text = (release / name).read_text(encoding="utf-8")
        if not name.endswith("toml"):
            values = map(json.loads, text.splitlines() if name.endswith("jsonl") else [text])
            assert all(isinstance(value["schema_version"], int) for value in values), name
        assert "schema_version" in text

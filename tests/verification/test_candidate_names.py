"""Names of the candidates of a comparison: one row and one folder for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import racdeploy
from racdeploy.runtime.deployed import find_model
from racdeploy.verification.compare import name_distinctly
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def _name(bundle: Path, named: dict[str, str]) -> list[str]:
    """Return the names of the same model at each path, under the name that its file has."""
    model = find_model(bundle)
    models = [model.renamed(name) for name in named.values()]
    return [each.name for each in name_distinctly(models, list(named))]


def test_files_of_one_name_are_told_apart_by_their_folders(bundle: Path) -> None:
    """By no more of their paths than is needed; another name stays as it is."""
    same = "model.gguf"
    found = _name(bundle, {"d1/model.gguf": same, "x/d2/model.gguf": same, "other.gguf": "other"})
    assert found == ["d1/model.gguf", "d2/model.gguf", "other"]
    assert _name(bundle, {"a/x/m": "m", "b/x/m": "m"}) == ["a/x/m", "b/x/m"]
    assert _name(bundle, {"org/a-GGUF:q8_0": "m", "org/b-GGUF:q8_0": "m"}) == [
        "a-GGUF:q8_0",
        "b-GGUF:q8_0",
    ]


def test_a_name_that_is_the_path_of_another_is_numbered(bundle: Path) -> None:
    """A bundle's name may be a stranger's."""
    names = {"d1/m": "m", "d2/m": "m", "bundle": "d1/m"}
    assert _name(bundle, names) == ["d1/m", "d2/m", "d1/m-2"]


def test_a_candidate_given_twice_is_refused(bundle: Path, tmp_path: Path) -> None:
    """Also by another path to it, before any work; a copy is another candidate."""
    (tmp_path / "link").symlink_to(bundle)
    for again in (bundle, bundle / ".", tmp_path / "link"):
        with raises("candidate-given-twice", str(bundle)):
            racdeploy.compare([bundle, again], against=bundle)
    with raises("candidate-given-twice"):
        racdeploy.compare(["http://127.0.0.1:1/v1#a"] * 2, against=bundle)

    shutil.copytree(bundle, tmp_path / "copy")
    found = _name(bundle, {str(bundle): "tiny", str(tmp_path / "copy"): "tiny"})
    assert found == ["bundle", "copy"]

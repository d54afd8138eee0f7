"""Writing files: what stands there already."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.files.writing import file_sha256, refuse_overwrite
from tests.support.errors import raises


def test_only_the_same_file_may_stand_where_one_is_written(tmp_path: Path) -> None:
    """By its content, so that a command that is run again ends as before."""
    written = tmp_path / "model.gguf"
    written.write_bytes(b"weights")
    sha256 = file_sha256(written)

    refuse_overwrite(written, sha256)
    refuse_overwrite(tmp_path / "new.gguf", sha256)


@pytest.mark.parametrize("kind", ["another file", "folder"])
def test_anything_else_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "model.gguf"
    if kind == "folder":
        place.mkdir()
    else:
        place.write_bytes(b"years of work")
    with raises("output-exists", "model.gguf"):
        refuse_overwrite(place, "0" * 64)

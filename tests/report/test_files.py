"""Folders of reports: their names are made of models' names, which may be a stranger's."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.api.records import Verdict
from racdeploy.cli import compare
from racdeploy.report.files import name_folders
from racdeploy.verification.gate import read_gate
from tests.support.commands import racdeploy
from tests.support.sample_report import build_report

HOSTILE = ["../../x", "..", ".", "", "/etc/x", "a/../../../x", "x\0y", "-" * 300, "~/x", "\u202ex"]


def test_a_folder_is_one_safe_component_of_a_path() -> None:
    folders = name_folders([*HOSTILE, "q8_0.gguf"])
    assert len({name.casefold() for name in folders}) == len(folders)
    assert folders[-1] == "q8_0.gguf"
    for name in folders:
        assert Path(name).name == name
        assert "\0" not in name
        assert 0 < len(name) <= 110


def test_equal_names_have_different_folders() -> None:
    """Also where the disk does not tell upper case from lower, and a number is taken."""
    names = ["m.gguf", "M.gguf", "m.gguf", "m.gguf-2", "a/b", "a-b"]
    assert name_folders(names) == ["m.gguf", "M.gguf-2", "m.gguf-3", "m.gguf-2-2", "a-b", "a-b-2"]


def test_reports_of_a_comparison_stay_in_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a bundle's manifest calls its model."""
    reports = [build_report().model_copy(update={"model": name}) for name in HOSTILE]
    verdicts = [Verdict.from_report(report, read_gate()) for report in reports]
    monkeypatch.setattr(compare, "call_with_progress", lambda *_: verdicts)

    racdeploy("compare", "m.gguf", "--against", "ref", "--reports", tmp_path / "a" / "r", "--card")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["r"]
    assert len(list((tmp_path / "a" / "r").glob("*/report.json"))) == len(HOSTILE)

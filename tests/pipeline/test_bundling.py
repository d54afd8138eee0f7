"""What a bundle holds about a model that learned from the dense one, and whole or absent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy.pipeline import bundling
from racdeploy.pipeline.bundling import BundleContents
from racdeploy.recipe import Pruning
from racdeploy.report.recovery import to_csv
from racdeploy.results.pruning import RecoveryRow
from racdeploy.results.report import Report

CURVE = "recover.csv"
SENTENCE = (
    "It learned from the dense model on 400,000 tokens afterwards: KL 0.912 → 0.0346 nats "
    "on held-out traces."
)


def with_recovery(contents: BundleContents, rows: tuple[RecoveryRow, ...]) -> BundleContents:
    report = contents.report.model_copy(update={"recovery": rows})
    return BundleContents(**{**vars(contents), "report": report})


def test_a_bundle_has_the_curve_of_its_recovery(contents: BundleContents, tmp_path: Path) -> None:
    """As a file, in the stored report, and as a sentence of the card."""
    bundling.write_bundle(tmp_path / "bundle", contents)
    stored = json.loads((tmp_path / "bundle" / "report.json").read_text(encoding="utf-8"))
    rows = Report.model_validate(stored).recovery
    assert rows == contents.report.recovery
    assert (tmp_path / "bundle" / CURVE).read_text(encoding="utf-8") == to_csv(rows)
    assert SENTENCE in (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8").split("\n")


def test_a_bundle_is_not_replaced_in_silence(
    contents: BundleContents, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the work, with the model that the old one is of; one that cannot be read, too."""
    caplog.set_level("INFO", "racdeploy")
    out = tmp_path / "bundle"
    bundling.check_replaceable(out)
    assert not caplog.messages

    bundling.write_bundle(out, contents)
    bundling.check_replaceable(out)
    (out / "racdeploy.json").write_text("{}")
    bundling.check_replaceable(out)
    readable, damaged = caplog.messages
    assert readable.startswith(f"replaces the bundle {out}, of ")
    assert contents.artifacts[0].name in readable
    assert damaged == f"replaces the bundle {out}"


def test_a_bundle_without_recovery_has_no_curve(contents: BundleContents, tmp_path: Path) -> None:
    """Nor is that of the bundle which it replaces left over."""
    bundling.write_bundle(tmp_path / "bundle", contents)
    before = {file.name for file in (tmp_path / "bundle").iterdir()}
    bundling.write_bundle(tmp_path / "bundle", with_recovery(contents, ()))
    after = {file.name for file in (tmp_path / "bundle").iterdir()}
    assert before - after == {CURVE}
    assert "It learned" not in (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")


def test_a_curve_that_cannot_be_written_leaves_no_bundle(
    contents: BundleContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or absent: no folder, no rest of one."""

    def fail(_: object) -> str:
        raise ValueError("no curve")

    monkeypatch.setattr(bundling, "to_csv", fail)
    with pytest.raises(ValueError, match="no curve"):
        bundling.write_bundle(tmp_path / "bundle", contents)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("prune", "says_so"),
    [
        ({}, True),
        ({"method": "magnitude"}, False),
        ({"method": "magnitude", "refit_steps": 1}, True),
    ],
)
def test_a_card_names_calibration_where_it_decided(
    contents: BundleContents, tmp_path: Path, prune: dict[str, object], says_so: bool
) -> None:
    """Plain magnitude looks at the weights alone."""
    recipe = contents.job.recipe.model_copy(update={"prune": Pruning(**prune)})  # type: ignore[arg-type]
    told = replace(contents, job=replace(contents.job, recipe=recipe))
    bundling.write_bundle(tmp_path / "bundle", told)
    card = (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert (", calibrated on its own chain of thought, stored as" in card) == says_so

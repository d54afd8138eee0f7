"""Questions of a comparison and of a recorded reference: the same ones, all of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import racdeploy
from racdeploy.api import verifications
from racdeploy.api.options import CompareOptions, RecordOptions
from racdeploy.recipe import Verification
from racdeploy.verification.evidence import ArmResult
from racdeploy.verification.reference import Reference
from tests.support.errors import raises
from tests.support.sample_report import build_records
from tests.support.tiny_artifacts import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize("asked", [4, 3, 200])
def test_a_file_is_asked_whole(bundle: Path, tmp_path: Path, asked: int) -> None:
    """Or as much of it as is wanted; the settings count the questions that there are."""
    rows = [{"question": f"{i} plus 1?", "answer": i + 1} for i in range(4)]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    options: dict[str, Any] = {"tasks": (f"jsonl:{file}",), "prompts": asked, "work": tmp_path}
    recording = RecordOptions(model=bundle, out=tmp_path / "reference", **options)
    recorded, _ = verifications.open_recording(recording)
    comparison = CompareOptions(candidates=(str(bundle),), against=str(bundle), **options)
    compared = verifications.open_comparison(comparison)
    assert len(recorded.problems) == min(asked, 4)
    assert recorded.settings.count == min(asked, 4)
    assert recorded.problems == compared.examiner.problems


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of the folder's name that was recorded with options of its own."""
    folder = tmp_path_factory.mktemp("recorded") / "ref"
    answers = tuple(record for record in build_records() if record.arm == "dense")
    settings = Verification(count=len(answers), max_new_tokens=300, logit_traces=0).with_limits()
    reference = Reference(
        name="f16.gguf",
        tasks=("jsonl:q 1.jsonl",),
        settings=settings,
        stop_ids=(0,),
        vocabulary=64,
        probes={},
        arm=ArmResult("dense", answers),
    )
    reference.write(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts", 500),
        ("samples", 4),
        ("temperature", 0.5),
        ("max_new_tokens", 48),
        ("max_thinking_tokens", 9),
        ("context_tokens", 1024),
        ("parallel", 3),
        ("seed", 1),
    ],
)
def test_a_reference_fixes_its_options(
    bundle: Path, recorded: Path, name: str, value: float
) -> None:
    """Another value is refused before any work, with the line that records again."""
    option = f"--{name.replace('_', '-')} {value}"
    line = "racdeploy record f16.gguf --tasks 'jsonl:q 1.jsonl' "
    with raises("reference-fixes-options", line, option, f"--out {recorded}"):
        racdeploy.compare([bundle], against=recorded, **{name: value})


def test_the_line_that_records_again_keeps_what_was_recorded(bundle: Path, recorded: Path) -> None:
    """A value that is the reference's own is no difference."""
    count = Reference.read(recorded).settings.count
    with raises("reference-fixes-options", f"--prompts {count} ", "--max-new-tokens 300 --seed 1"):
        racdeploy.compare([bundle], against=recorded, prompts=count, seed=1)


def test_a_tier_gives_a_reference_no_other_samples(
    bundle: Path, recorded: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate.toml"
    gate.write_text("[tiers.smoke]\nsamples = 2\ntemperature = 0.7\n")
    with raises("reference-fixes-options", "--samples 2", "--temperature 0.7"):
        racdeploy.compare([bundle], against=recorded, tier="smoke", gate=gate)

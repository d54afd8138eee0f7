"""Two engines that answer the same prompts: alike, different, or too few prompts to tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy.files.writing import file_sha256
from racdeploy.recipe import Verification
from racdeploy.verification.checks import backends, integrity, tokens
from racdeploy.verification.evidence import Evidence, OtherArtifact
from racdeploy.verification.gate import read_gate
from tests.support.records import arm_of, record


def evidence_of(count: int, *, wrong: int = 0, longer: int = 0) -> Evidence:
    """Return evidence in which a second engine gets ``wrong`` prompts wrong and thinks ``longer``
    on each.
    """
    main = arm_of([record(i, extracted=str(i)) for i in range(count)])
    changed = [
        record(
            i,
            correct=i >= wrong,
            extracted="x" if i < wrong else str(i),
            thinking_tokens=100 + longer,
        )
        for i in range(count)
    ]
    other = OtherArtifact(replace(arm_of(changed), quant="f32"), "onnxruntime", Path(), {})
    return Evidence(
        settings=Verification().with_limits(),
        gate=read_gate(),
        dense=main,
        pruned=main,
        artifact=Path(),
        artifact_files={},
        requested_sparsity=0.5,
        backend="llamacpp",
        other_artifacts=(other,),
    )


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (evidence_of(200), "pass"),
        (evidence_of(200, wrong=40), "fail"),
        (evidence_of(200, longer=60), "fail"),
        (evidence_of(12), "inconclusive"),
    ],
)
def test_engines_are_equivalent_within_the_limits(evidence: Evidence, verdict: str) -> None:
    """Equal answers on twelve prompts leave more than five points of doubt; on two hundred they do
    not.
    """
    assert backends.check(evidence).verdict == verdict


def test_the_figures_say_how_alike_the_answers_are() -> None:
    found = backends.check(evidence_of(200, wrong=40))
    assert (found.figures["onnxruntime_same_answers"], found.figures["onnxruntime_difference"]) == (
        0.8,
        0.2,
    )
    assert "onnxruntime f32 against llamacpp q8_0" in found.summary


def test_one_engine_has_nobody_to_agree_with() -> None:
    found = backends.check(replace(evidence_of(20), other_artifacts=()))
    assert (found.verdict, found.remedy) == (
        "skipped",
        "build it with a second target: --more-targets TARGET",
    )


def test_the_files_of_every_artifact_are_hashed(tmp_path: Path) -> None:
    main, second = tmp_path / "model.gguf", tmp_path / "model.onnx"
    main.write_bytes(b"main")
    second.write_bytes(b"second")
    base = evidence_of(20)
    other = replace(
        base.other_artifacts[0], artifact=second, artifact_files={"model.onnx": file_sha256(second)}
    )
    whole = replace(
        base,
        artifact=main,
        artifact_files={"model.gguf": file_sha256(main)},
        other_artifacts=(other,),
    )
    assert integrity.check(whole).verdict == "pass"
    second.write_bytes(b"another")
    found = integrity.check(whole)
    assert (found.verdict, "model.onnx" in found.summary) == ("fail", True)


def test_an_engine_without_a_tokenizer_is_not_asked_for_tokens() -> None:
    found = tokens.check(replace(evidence_of(20), probes=None, backend="onnxruntime"))
    assert (found.verdict, "onnxruntime has no tokenizer" in found.summary) == ("skipped", True)

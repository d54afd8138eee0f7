"""Strings that llama.cpp tokenizes differently: refused with their count, or accepted and shown.

The checkpoint has o200k's pre-tokenizer; of 200 strings, one differs in the stock llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.exporting import ExportResult, write
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import bundling, token_differences
from racdeploy.pipeline.gates import GateResult, check_artifact
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.token_differences import check_tokens
from racdeploy.recipe import Export, Recipe
from racdeploy.report.summary import describe_token_differences, write_findings
from racdeploy.results.checks import CheckResult
from racdeploy.verification import measurements
from racdeploy.verification.checks import tokens
from racdeploy.verification.evidence import Evidence
from racdeploy.verification.gate import read_gate
from racdeploy.verification.probe_strings import choose_probe_strings, read_probe_strings
from tests.support.approximated import STRINGS, write_o200k
from tests.support.commands import find_error_code
from tests.support.errors import raises
from tests.support.records import arm_of, record
from tests.support.tiny_models import make_checkpoint

IDS = [int(i * 37 % 480) for i in range(40)]
SENTENCE = (
    "The artifact's engine tokenizes 1 of 200 hard strings (0.500%) differently from "
    "tokenizer.json, up to 1.000% is accepted; one is 'the GRÜNE'."
)


def _accepting(share: float) -> Export:
    return Export(quant="q8_0", accept_token_differences=share)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_o200k(tmp_path_factory.mktemp("o200k") / "model"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> ExportResult:
    out = tmp_path_factory.mktemp("artifact") / "m.gguf"
    return write(checkpoint, out, _accepting(0.01))


@pytest.fixture(autouse=True, scope="module")
def few_strings() -> Iterator[None]:
    """Compare 200 strings in the place of 10,380: the share of one is known then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "choose_probe_strings", lambda accepted: STRINGS)
        yield


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint, artifact: ExportResult) -> GateResult:
    return _check(checkpoint, artifact, 0.01)


def _check(checkpoint: Checkpoint, artifact: ExportResult, share: float) -> GateResult:
    job = Job(Recipe(model=str(checkpoint.folder), export=_accepting(share)))
    return check_artifact(job, checkpoint, artifact, IDS, threads=1)


def _judge(found: GateResult, share: float) -> CheckResult:
    arm = arm_of([record(0)])
    evidence = Evidence(
        settings=Recipe().verify,
        gate=read_gate(),
        dense=arm,
        pruned=arm,
        probes=found.probes,
        token_differences=share,
    )
    return tokens.check(evidence).to_result("tokens")


def test_a_difference_is_refused_with_its_count_and_the_way_to_accept_it(
    checkpoint: Checkpoint,
) -> None:
    """Before any work: how many differ, the first with both ids, and the share to set."""
    counted = ("0.500%", "1 of 200", "'the GRÜNE': [")
    ways = ("export.accept_token_differences = 0.005", "--accept-token-differences 0.005")
    with raises("no-equal-pre-tokenizer", *counted, *ways):
        check_tokens(checkpoint, Export())


def test_no_more_is_accepted_than_the_recipe_names(checkpoint: Checkpoint) -> None:
    """A share just below is refused, the share itself goes on, and what is found is said."""
    with raises("no-equal-pre-tokenizer", "0.490%", "1 of 200"):
        check_tokens(checkpoint, _accepting(0.0049))

    told = check_tokens(checkpoint, _accepting(0.005))
    assert told.startswith("llama.cpp's pre-tokenizer granite-embed-multi-97m: 1 of 200 strings")


def test_too_many_differences_cannot_be_accepted(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy names no share beyond the largest."""
    monkeypatch.setattr(measurements, "choose_probe_strings", lambda accepted: STRINGS[-1:])
    with raises("no-equal-pre-tokenizer", "100.000%", "5%"):
        check_tokens(checkpoint, _accepting(0.05))


def test_a_known_pre_tokenizer_is_not_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is loaded where llama.cpp has an equal; a name of the user's own is counted."""
    known = Checkpoint(make_checkpoint(tmp_path / "model", "llama"))
    assert check_tokens(known, Export(pre_tokenizer="qwen2")).endswith("200 strings, equal ids")

    monkeypatch.setattr(measurements, "choose_probe_strings", lambda accepted: read_probe_strings())
    with raises("no-equal-pre-tokenizer", "'gpt-2'"):
        check_tokens(known, Export(pre_tokenizer="gpt-2"))

    monkeypatch.setattr(token_differences, "probe_tokens", None)
    assert check_tokens(known, Export()) == ""


def test_the_gate_counts_in_the_artifact(
    checkpoint: Checkpoint, artifact: ExportResult, found: GateResult
) -> None:
    """Within the share, a note; above it, an error with the count."""
    assert "1 of 200 strings tokenize differently, as accepted; KL " in found.notes[1]

    with raises("tokens-differ", "0.500%", "0.400%", "1 of 200", "'the GR"):
        _check(checkpoint, artifact, 0.004)
    with raises("tokens-differ", "1 of 200"):
        _check(checkpoint, artifact, 0.0)


def test_report_card_and_manifest_show_what_was_accepted(
    found: GateResult, contents: bundling.BundleContents, tmp_path: Path
) -> None:
    """The count, the share and an example; the check fails where less is accepted."""
    judged = _judge(found, 0.01)
    figures = {"strings": 200, "different": 1, "share": 0.005, "accepted": 0.01}
    assert (judged.verdict, judged.figures) == ("pass", figures | {"example": "'the GRÜNE'"})
    assert judged.summary.endswith("; 0.500%, accepted up to 1.000%")
    assert _judge(found, 0.004).verdict == "fail"
    assert _judge(found, 0.0).verdict == "fail"

    others = [check for check in contents.report.checks if check.name != "tokens"]
    report = contents.report.model_copy(update={"checks": (*others, judged)})
    assert describe_token_differences(report) == SENTENCE
    assert SENTENCE in write_findings(report)

    bundling.write_bundle(tmp_path / "bundle", replace(contents, report=report))
    assert SENTENCE in (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((tmp_path / "bundle" / "racdeploy.json").read_text(encoding="utf-8"))
    differences = {"strings": 200, "different": 1, "accepted": 0.01, "example": "'the GRÜNE'"}
    assert manifest["tokenizer"]["differences"] == differences


def test_equal_ids_are_no_difference(contents: bundling.BundleContents, tmp_path: Path) -> None:
    """Neither card nor manifest says anything then."""
    assert describe_token_differences(contents.report) == ""
    manifest = bundling.write_bundle(tmp_path / "bundle", contents)
    assert manifest.tokenizer.differences is None


def test_export_takes_the_share_on_the_command_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without it, one line and exit code 2; with it, the file, and the count beside it."""
    asked = ["export", str(checkpoint.folder), "--out", str(tmp_path / "m.gguf")]
    refused = CliRunner().invoke(app, asked)
    assert find_error_code(refused.output) == "no-equal-pre-tokenizer"
    assert (refused.exit_code, (tmp_path / "m.gguf").exists()) == (2, False)

    accepted = CliRunner().invoke(app, [*asked, "--accept-token-differences", "0.005"])
    assert accepted.exit_code == 0
    assert "1 of 200 strings differ" in " ".join(accepted.output.split())
    assert (tmp_path / "m.gguf").is_file()


@pytest.mark.parametrize("share", [-0.001, 0.051, float("nan")])
def test_shares_that_are_none_are_refused(share: float) -> None:
    """Beyond 5 %, an expression is another one and not an approximation."""
    with pytest.raises(ValidationError):
        _accepting(share)


def test_shares_are_of_ten_thousand_strings() -> None:
    """Of 380 alone, one string would be more than most would accept; without a share, all count."""
    assert choose_probe_strings(0.0) == read_probe_strings()
    assert len({*choose_probe_strings(0.0005)}) > 10_300

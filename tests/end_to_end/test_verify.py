"""``racdeploy verify`` as a CI job uses it: twice, killed, by tiers, with and without the dense
model.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from racdeploy.manifest import Manifest
from tests.support.commands import Outcome, environment, racdeploy
from tests.support.fake_bundle import read_files
from tests.support.hold import held_at_answers, held_command
from tests.support.tiny_models import edit_json
from tests.support.waiting import wait_for_stop

GATE = """\
[tiers.smoke]
prompts = 12
checks = ["accuracy", "thinking", "tokens", "template"]
inconclusive = "pass"
"""


def _verify(bundle: Path, work: Path, *more: object) -> Outcome:
    return racdeploy("verify", bundle, "--work", work, "--json", *more)


def _report(outcome: Outcome) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(outcome.out)
    return report


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gate") / "racdeploy-gate.toml"
    file.write_text(GATE)
    return file


def test_two_runs_give_one_verdict_and_leave_nothing(
    built: Path, gate: Path, tmp_path: Path
) -> None:
    """The same figures in every check; the second run answers from scratch."""
    first, second = (
        _report(_verify(built, tmp_path, "--gate", gate, "--tier", "smoke")) for _ in range(2)
    )
    assert first["verdict"] == second["verdict"]
    assert first["checks"] == second["checks"]
    assert not any("earlier run" in note for note in second["notes"])
    assert not list(tmp_path.iterdir())


def test_a_signed_bundle_is_as_signed_after_it_was_verified_and_run(
    built: Path, gate: Path, tmp_path: Path
) -> None:
    """Neither writes into it; one byte more, and nothing of it is run."""
    bundle = shutil.copytree(built, tmp_path / "bundle")
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    kind = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *kind))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))

    assert racdeploy("sign", bundle, "--key", private).code == 0
    before = read_files(bundle)
    asked = ("--tier", "smoke", "--gate", gate, "--public-key", public)
    verified = _verify(bundle, tmp_path / "work", *asked, "--reports", tmp_path / "reports")
    assert verified.code == 0, verified.err
    assert f"matches the signature of {public}" in " ".join(verified.err.split())
    assert racdeploy("run", bundle, "What is 2 + 2?").code == 0
    assert read_files(bundle) == before

    with (bundle / "README.md").open("a") as card:
        card.write(" ")
    refused = _verify(bundle, tmp_path / "work", *asked, "--exit-zero")
    assert refused.code == 2
    assert "Hash mismatch for 'README.md'" in refused.out


def test_a_killed_run_loses_only_the_prompts_in_flight(built: Path, tmp_path: Path) -> None:
    """Killed after some answers: the next run reads them back and says so."""
    kept = 20
    process = subprocess.Popen(
        held_command("verify", built, "--work", tmp_path, "--json", "--threads", 1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(**held_at_answers(kept)),
    )
    wait_for_stop(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    again = _verify(built, tmp_path, "--threads", 1)
    assert again.code == 0, again.err
    (note,) = [note for note in _report(again)["notes"] if "earlier run" in note]
    assert kept <= int(note.split()[0]) < 60
    whole = _report(_verify(built, tmp_path, "--threads", 1))
    decided = ("accuracy", "thinking", "template", "tokens")
    assert [c for c in whole["checks"] if c["name"] in decided] == [
        c for c in _report(again)["checks"] if c["name"] in decided
    ]


def test_a_plan_says_what_a_run_can_show(built: Path, gate: Path, tmp_path: Path) -> None:
    """Before anything runs; from the bundle's own discordant prompts."""
    outcome = _verify(built, tmp_path, "--gate", gate, "--tier", "smoke", "--plan")
    plan = _report(outcome)
    assert (outcome.code, plan["evaluation_prompts"], plan["tier"]) == (0, 12, "smoke")
    assert 0 < plan["smallest_detectable_drop"] < 1
    assert plan["dense_answers"] == "12 recorded"
    assert not list(tmp_path.iterdir())


def test_the_dense_artifact_runs_beside_the_pruned_one(built: Path, tmp_path: Path) -> None:
    """More prompts than the bundle holds need it; another file is refused."""
    (dense,) = (built.parent / "work").glob("export-*/tiny-reasoner-dense-q8_0.gguf")
    (tmp_path / "gate.toml").write_text("[tiers.release]\nprompts = 66\n[speed]\nratio = 0.01\n")
    options = ("--gate", tmp_path / "gate.toml", "--tier", "release")
    refused = _verify(built, tmp_path / "work", *options)
    assert (refused.code, "6 of 66 answers of the dense model" in refused.out) == (2, True), (
        refused.out
    )
    assert "omit --tier to ask the 60 prompts that are stored; or use a gate file" in refused.out
    report = _report(_verify(built, tmp_path / "work", *options, "--baseline", dense))
    assert [arm["prompts"] for arm in report["arms"]] == [66, 66]
    assert {check["name"]: check["verdict"] for check in report["checks"]}["speed"] == "pass"
    assert any("run again, from tiny-reasoner-dense" in note for note in report["notes"])
    other = tmp_path / "other.gguf"
    other.write_bytes(dense.read_bytes()[:-1] + b"\0")
    wrong = _verify(built, tmp_path / "work", *options, "--baseline", other)
    assert (wrong.code, "is not the dense artifact of this bundle" in wrong.out) == (2, True), (
        wrong.out
    )
    assert "below its --work folder" in " ".join(wrong.out.split())


def test_a_speed_limit_without_the_dense_artifact_is_wrong_usage(
    built: Path, tmp_path: Path
) -> None:
    """Exit code 2: a gate on a figure that this run does not measure."""
    (tmp_path / "gate.toml").write_text(GATE + "[speed]\nratio = 1.1\n")
    outcome = _verify(built, tmp_path / "work", "--gate", tmp_path / "gate.toml", "--tier", "smoke")
    assert outcome.code == 2, outcome.out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_another_bundle_of_the_same_model_is_a_baseline(
    built: Path, copy: Path, gate: Path, tmp_path: Path
) -> None:
    """And one of another model, or that decoded differently, is refused."""
    options = ("--gate", gate, "--tier", "smoke", "--baseline", copy)
    report = _report(_verify(built, tmp_path / "work", *options))
    assert any("from copy" in note for note in report["notes"])
    manifest = json.loads((copy / "racdeploy.json").read_text())
    recipe = manifest["recipe"] | {"verify": manifest["recipe"]["verify"] | {"max_new_tokens": 99}}
    edit_json(copy / "racdeploy.json", recipe=recipe)
    outcome = _verify(built, tmp_path / "work", *options)
    assert (outcome.code, "dense-settings-differ" in outcome.out) == (2, True), outcome.out
    files = dict.fromkeys(manifest["base"]["files"], "0" * 64)
    edit_json(copy / "racdeploy.json", base=manifest["base"] | {"files": files})
    outcome = _verify(built, tmp_path / "work", *options)
    assert (outcome.code, "baseline-of-other-model" in outcome.out) == (2, True), outcome.out


def test_other_conditions_are_told(built: Path, copy: Path, gate: Path, tmp_path: Path) -> None:
    """Recorded with another version: the report says which."""
    report = json.loads((copy / "report.json").read_text())
    edit_json(
        copy / "report.json", fingerprint=report["fingerprint"] | {"llama-cpp-python": "0.0.1"}
    )
    found = _report(_verify(copy, tmp_path / "work", "--gate", gate, "--tier", "smoke"))
    assert any("other conditions: llama-cpp-python 0.0.1, now" in note for note in found["notes"])


def test_an_empty_suite_is_an_error(copy: Path, tmp_path: Path) -> None:
    """No dense record, no verdict."""
    (copy / "records.jsonl").write_text("")
    outcome = _verify(copy, tmp_path / "work")
    assert (outcome.code, "holds 0 dense records" in outcome.out) == (2, True), outcome.out
    assert Manifest.read(copy).verdict == "pass"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--tier", "smok"), "did you mean 'smoke'"),
        (("--baseline", "nowhere.gguf"), "nowhere.gguf does not exist"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    built: Path, tmp_path: Path, option: tuple[str, str], said: str
) -> None:
    """Exit code 2 and nothing on disk."""
    outcome = _verify(built, tmp_path / "work", *option)
    assert (outcome.code, said in outcome.out) == (2, True), outcome.out
    assert not (tmp_path / "work").exists()

"""A bundle for two engines, from the build to an answer and to a second verification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import racdeploy
from racdeploy.manifest import Manifest
from tests.support.certain_models import make_certain_checkpoint
from tests.support.commands import racdeploy as command


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build one bundle of a model that is certain, ONNX first and GGUF beside it."""
    root = tmp_path_factory.mktemp("onnx")
    model = make_certain_checkpoint(root / "model", "qwen3")
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(40)]
    (root / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = (
        'also = ["gguf"]\n[traces]\nmax_new_tokens = 24\nbatch_size = 8\n'
        '[calibration]\nkeep_truncated = true\n[export]\nquant = "f32"\n'
        "[verify]\nmax_new_tokens = 24\ncontext_tokens = 128\nlogit_traces = 2\n"
    )
    (root / "recipe.toml").write_text(text, encoding="utf-8")
    outcome = command(
        *("build", model, "--target", "onnx", "--tasks", f"jsonl:{root / 'problems.jsonl'}"),
        *(
            "--recipe",
            root / "recipe.toml",
            "--work",
            root / "work",
            "--out",
            root / "bundle",
            "--threads",
            1,
            "--json",
        ),
    )
    assert outcome.code == 3, outcome.err  # it answers nothing right
    (root / "report.json").write_text(outcome.out, encoding="utf-8")
    return root


def test_both_engines_were_verified_and_compared(root: Path) -> None:
    report = json.loads((root / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["dense", "pruned", "pruned, llamacpp"]
    assert all(arm["peak_rss_bytes"] and arm["tokens_per_s"] for arm in report["arms"])
    checks = {check["name"]: check for check in report["checks"]}
    assert {checks[name]["verdict"] for name in ("integrity", "logits", "sparsity")} == {"pass"}
    assert checks["tokens"]["verdict"] == "skipped"
    assert "llamacpp q8_0 against onnxruntime f32" in checks["backends"]["summary"]
    assert checks["logits"]["figures"]["export_kl_nats"] < 1e-6
    assert report["fingerprint"]["onnxruntime"] != "not installed"


def test_the_bundle_holds_what_either_engine_needs(root: Path) -> None:
    bundle = root / "bundle"
    onnx, gguf = Manifest.read(bundle).artifacts
    assert (onnx.path, onnx.backend, gguf.backend) == ("onnx/model.onnx", "onnxruntime", "llamacpp")
    assert json.loads((bundle / "config.json").read_text())["transformers.js_config"] == {
        "dtype": "fp32"
    }
    assert (
        json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]["filename"]
        == onnx.path
    )
    answers = []
    for backend in (None, "onnxruntime", "llamacpp"):
        with racdeploy.load(bundle, backend=backend, threads=1) as model:
            answers.append(model.generate("2 + 2?", temperature=0))
    assert answers[0] == answers[1]
    assert answers[2].thinking_tokens > 0


def test_inspect_names_both_artifacts(root: Path) -> None:
    outcome = command("inspect", root / "bundle", "--json")
    summary = json.loads(outcome.out)["summary"]
    assert summary["artifact"] == "onnx/model.onnx"
    assert ".gguf, q8_0, plain, " in summary["artifact for llamacpp"]


def test_a_finished_bundle_is_verified_again_on_both(root: Path) -> None:
    outcome = command("verify", root / "bundle", "--threads", 1, "--json")
    assert outcome.code == 3, outcome.err
    report = json.loads(outcome.out)
    assert [arm["name"] for arm in report["arms"]] == ["dense", "pruned", "pruned, llamacpp"]
    checks = {check["name"]: check["verdict"] for check in report["checks"]}
    assert (checks["integrity"], checks["sparsity"], checks["tokens"]) == (
        "pass",
        "pass",
        "skipped",
    )


def test_a_changed_graph_is_noticed(root: Path) -> None:
    file = root / "bundle" / "onnx" / "model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\x08\x09")  # a field that says the same again
    outcome = command("verify", root / "bundle", "--threads", 1, "--json")
    file.write_bytes(whole)
    assert outcome.code in (1, 2), outcome.err
    assert "SHA-256" in outcome.out + outcome.err


def test_two_targets_for_one_engine_are_refused(root: Path) -> None:
    outcome = command(
        "build", root / "model", "--target", "onnx", "--more-targets", "browser", "--dry-run"
    )
    assert (outcome.code, outcome.error_code) == (2, "targets-share-engine")

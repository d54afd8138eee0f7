"""A packed bundle from the build to an answer: small, verified unpacked, refused when it lies."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest
from tests.support.certain_models import make_certain_checkpoint
from tests.support.commands import Outcome, racdeploy
from tests.support.tiny_models import edit_json


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build one packed bundle of a model that is certain, with a cache of its own."""
    root = tmp_path_factory.mktemp("packed")
    model = make_certain_checkpoint(root / "model", "qwen3")
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(40)]
    (root / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = "[traces]\nmax_new_tokens = 24\nbatch_size = 8\n[calibration]\nkeep_truncated = true\n"
    text += "[verify]\nmax_new_tokens = 24\ncontext_tokens = 128\nlogit_traces = 2\n"
    (root / "recipe.toml").write_text(text, encoding="utf-8")
    outcome = _run(
        root,
        *(
            "build",
            model,
            "--tasks",
            f"jsonl:{root / 'problems.jsonl'}",
            "--recipe",
            root / "recipe.toml",
        ),
        *(
            "--work",
            root / "work",
            "--out",
            root / "bundle",
            "--packing",
            "bitmask",
            "--threads",
            1,
            "--json",
        ),
    )
    assert outcome.code == 3, outcome.err  # it answers nothing right
    (root / "report.json").write_text(outcome.out, encoding="utf-8")
    return root


def _run(root: Path, *arguments: object, **extra: str) -> Outcome:
    return racdeploy(*arguments, XDG_CACHE_HOME=str(root / "cache"), **extra)


def test_the_artifact_is_the_packed_file(root: Path) -> None:
    """Size and hash are those of the container; every tensor is packed or says why not."""
    (entry,) = Manifest.read(root / "bundle").artifacts
    report = json.loads((root / "report.json").read_text())
    packed = root / "bundle" / entry.path
    assert (packed.suffix, entry.packing, entry.sha256) == (
        ".racgguf",
        "bitmask",
        file_sha256(packed),
    )
    assert (
        entry.size_bytes
        == packed.stat().st_size
        == report["arms"][1]["size_bytes"]
        < report["arms"][0]["size_bytes"]
    )
    assert {row["packing"] for row in report["tensors"] if row["zeros"] > 0.45} == {"bitmask"}
    assert all(row["packing_reason"] for row in report["tensors"] if row["packing"] == "plain")
    checks = {check["name"]: check["verdict"] for check in report["checks"]}
    assert {checks[name] for name in ("integrity", "logits", "sparsity", "tokens")} == {"pass"}
    assert "racdeploy unpack" in (root / "bundle" / "README.md").read_text(encoding="utf-8")


def test_it_is_unpacked_on_first_use_without_torch_and_gguf(root: Path, tmp_path: Path) -> None:
    """A device has numpy and llama.cpp; the cache holds the plain file under its hash."""
    blocked = "torch", "transformers", "safetensors", "gguf"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {blocked}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    outcome = racdeploy(
        "run", root / "bundle", "2 + 2?", "--json", XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=path
    )
    assert outcome.code == 0, outcome.err
    (file,) = (tmp_path / "racdeploy" / "unpacked").iterdir()
    assert (
        file.stem
        == file_sha256(file)
        == Manifest.read(root / "bundle").artifacts[0].unpacked_sha256
    )


def test_a_packed_bundle_is_verified_and_inspected(root: Path) -> None:
    """The checks run on the unpacked file; types, zeros and packing are shown."""
    outcome = _run(root, "verify", root / "bundle", "--json")
    assert outcome.code == 3, outcome.err
    verdicts = {check["name"]: check["verdict"] for check in json.loads(outcome.out)["checks"]}
    assert {verdicts[name] for name in ("integrity", "sparsity", "tokens")} == {"pass"}
    found = json.loads(_run(root, "inspect", root / "bundle", "--json").out)
    assert found["summary"]["packing"] == "bitmask"
    assert {"bitmask", "plain"} == {row["packing"] for row in found["tensors"]}


def test_a_container_of_another_file_is_refused(root: Path, tmp_path: Path) -> None:
    """A manifest that names another plain file stops run and verify before the engine starts."""
    copy = tmp_path / "bundle"
    shutil.copytree(root / "bundle", copy)
    (entry,) = json.loads((copy / "racdeploy.json").read_text())["artifacts"]
    edit_json(copy / "racdeploy.json", artifacts=[entry | {"unpacked_sha256": "0" * 64}])
    for command in (("run", copy, "2 + 2?"), ("verify", copy)):
        outcome = _run(root, *command)
        assert (outcome.code, outcome.error_code) == (2, "differs-from-manifest"), outcome.err


@pytest.mark.parametrize(
    ("quant", "reason"), [("q4_k", "does not keep them"), ("q6_k", "knows the fields of")]
)
def test_a_quant_that_cannot_be_packed_is_refused_before_any_work(
    tmp_path: Path, quant: str, reason: str
) -> None:
    """Exit code 2, the reason and other quants; no folder appears."""
    options = "--packing", "bitmask", "--work", tmp_path / "work", "--out", tmp_path / "bundle"
    outcome = racdeploy("build", "--quant", quant, *options)
    assert (outcome.code, outcome.error_code) == (2, "packing-unfit-for-quant"), outcome.err
    assert reason in outcome.err
    assert "q8_0" in outcome.err
    assert not list(tmp_path.iterdir())


def test_export_packs_what_it_writes(root: Path, tmp_path: Path) -> None:
    """One stage alone; the plain file comes back byte for byte, and a wrong suffix is refused."""
    plain, packed = tmp_path / "plain.gguf", tmp_path / "packed.racgguf"
    folder = next((root / "work").glob("prune-*/*/config.json")).parent
    assert racdeploy("export", folder, "--out", plain).code == 0
    assert racdeploy("export", folder, "--packing", "bitmask", "--out", packed).code == 0
    assert racdeploy("unpack", packed).code == 0
    assert plain.read_bytes() == (tmp_path / "packed.gguf").read_bytes()
    outcome = racdeploy("unpack", packed, "--out", plain)
    assert f"{plain} existed and was replaced" in outcome.err
    outcome = racdeploy("export", folder, "--packing", "bitmask", "--out", tmp_path / "m.gguf")
    assert (outcome.code, outcome.error_code) == (2, "wrong-file-name")
    assert "m.racgguf" in outcome.err

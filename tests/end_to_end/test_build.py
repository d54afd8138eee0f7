"""The main job, from a model folder to an answer, on every family and both checkpoint styles."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from racdeploy.manifest import Manifest
from tests.support.certain_models import make_certain_checkpoint
from tests.support.commands import Outcome, racdeploy

BUNDLE_FILES = {
    "racdeploy.json",
    "README.md",
    "Modelfile",
    "report.json",
    "report.md",
    "report.html",
    "records.jsonl",
}


def _problems(folder: Path) -> Path:
    file = folder / "problems.jsonl"
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def _recipe(folder: Path) -> Path:
    file = folder / "recipe.toml"
    text = "[traces]\nmax_new_tokens = 24\nbatch_size = 8\n[calibration]\nkeep_truncated = true\n"
    text += '[export]\nquant = "q8_0"\n'
    file.write_text(
        text + "[verify]\nmax_new_tokens = 24\ncontext_tokens = 128\nlogit_traces = 2\n",
        encoding="utf-8",
    )
    return file


def _build(model: Path, folder: Path, *more: object) -> Outcome:
    task = f"jsonl:{_problems(folder)}"
    options = [
        "--tasks",
        task,
        "--recipe",
        _recipe(folder),
        "--work",
        folder / "work",
        "--out",
        folder / "bundle",
    ]
    return racdeploy("build", model, *options, "--threads", 1, *more)


@pytest.mark.parametrize(
    ("family", "transformers5"),
    [
        ("qwen3", True),
        ("llama", False),
        pytest.param("qwen2", False, marks=pytest.mark.more),
        pytest.param("qwen2", True, marks=pytest.mark.more),
        pytest.param("llama", True, marks=pytest.mark.more),
    ],
)
def test_a_model_nobody_here_trained_goes_through(
    family: str, transformers5: bool, tmp_path: Path
) -> None:
    """Any folder with a template and a jsonl task becomes a bundle; no answer is right: exit 3."""
    model = make_certain_checkpoint(
        tmp_path / "model", family, transformers5=transformers5, tied=transformers5
    )
    outcome = _build(model, tmp_path, "--json")
    assert outcome.code == 3, outcome.err
    report = json.loads(outcome.out)
    checks = {check["name"]: check["verdict"] for check in report["checks"]}
    assert checks["accuracy"] == "inconclusive"
    assert {checks[name] for name in ("integrity", "logits", "sparsity", "tokens")} == {"pass"}
    names = {file.name for file in (tmp_path / "bundle").iterdir()}
    assert names >= BUNDLE_FILES
    assert "Traceback" not in outcome.err


def test_dense_models_of_the_same_size_answer_too(tmp_path: Path) -> None:
    """Their quants fit the rows, their files are no larger; they are shown and decide nothing."""
    model = make_certain_checkpoint(tmp_path / "model", "qwen3")
    outcome = _build(model, tmp_path, "--compare-same-size", "--json")
    assert outcome.code == 3, outcome.err
    report = json.loads(outcome.out)
    arms = {arm["name"]: arm for arm in report["arms"]}
    rivals = [name for name in arms if name not in ("dense", "pruned")]
    assert rivals
    assert [row["name"] for row in report["rivals"]] == ["dense", *rivals]
    assert all(arms[name]["size_bytes"] <= 1.02 * arms["pruned"]["size_bytes"] for name in rivals)
    assert {arms[name]["quant"] for name in rivals} & {"q8_0"} == set()
    lines = (tmp_path / "bundle" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["arm"] for line in lines} == set(arms)
    page = (tmp_path / "bundle" / "report.md").read_text(encoding="utf-8")
    assert "Comparison with dense models" in page


def test_the_embedded_model_passes_and_answers(built: Path) -> None:
    """The bundle answers a fresh question, with the thinking apart from the answer."""
    outcome = racdeploy("run", built, "What is 47 times 36?", "--temperature", 0, "--json")
    result = json.loads(outcome.out)
    assert (outcome.code, result["state"]) == (0, "closed")
    assert "1692" in result["answer"]
    assert "47*6" in result["thinking"]


def test_a_bundle_runs_without_torch(built: Path, tmp_path: Path) -> None:
    """With llama-cpp-python alone, a bundle loads and answers: torch and the rest are blocked."""
    blocked = "torch", "transformers", "safetensors", "gguf", "optimum"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {blocked}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    outcome = racdeploy("run", built, "What is 12 times 12?", "--temperature", 0, PYTHONPATH=path)
    assert outcome.code == 0, outcome.err
    assert "144" in outcome.out


def test_verify_passes_an_intact_bundle_and_writes_its_reports(built: Path, tmp_path: Path) -> None:
    """The same prompts give the same answers, and the reports appear where they were asked for."""
    outcome = racdeploy(
        "verify", built, "--junit", tmp_path / "junit.xml", "--html", tmp_path / "report.html"
    )
    assert outcome.code == 0, outcome.out + outcome.err
    assert (tmp_path / "junit.xml").read_text().startswith("<?xml")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_verify_fails_on_one_changed_byte(built: Path, tmp_path: Path) -> None:
    """A damaged artifact fails the gate: exit code 1, before a question is asked."""
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    artifact = copy / Manifest.read(copy).artifacts[0].path
    data = bytearray(artifact.read_bytes())
    data[-300] ^= 0xFF
    artifact.write_bytes(data)
    outcome = racdeploy("verify", copy)
    assert (outcome.code, outcome.out) == (1, ""), outcome.out + outcome.err
    assert "integrity failed, so no question was asked" in outcome.err
    assert "ask tiny" not in outcome.err


def test_inspect_counts_the_zeros_in_the_file(built: Path) -> None:
    """Half of every linear is zero in the artifact itself, embeddings are dense."""
    artifact = built / Manifest.read(built).artifacts[0].path
    found = json.loads(racdeploy("inspect", artifact, "--json").out)
    zeros = {row["name"]: row["zeros"] for row in found["tensors"]}
    linears = [
        value
        for name, value in zeros.items()
        if name.endswith(("attn_q.weight", "ffn_down.weight"))
    ]
    assert len(linears) == 8
    assert all(0.499 <= value <= 0.53 for value in linears)
    assert zeros["token_embd.weight"] < 0.1
    assert found["summary"]["racdeploy.sparsity"] == 0.5
    printed = racdeploy("inspect", artifact).out.splitlines()
    rows = printed[2 : 2 + len(zeros)]  # after the title and the names of the columns
    assert list(zeros) == [line.split()[0] for line in rows]  # no name is cut short


def test_a_second_build_reuses_every_stage(built: Path, work: Path, tmp_path: Path) -> None:
    """The same artifact, byte for byte, with the speed and memory that the first build measured."""
    again = tmp_path / "again"
    outcome = racdeploy(
        *("build", "--target", "ci-smoke", "--sparsity", 0.5),
        *("--trace-prompts", 64, "--prompts", 60, "--work", work, "--out", again),
    )
    assert outcome.code == 0, outcome.err
    assert Manifest.read(built).artifacts == Manifest.read(again).artifacts

    first, second = (
        json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for folder in (built, again)
    )
    for before, after in zip(first["arms"], second["arms"], strict=True):
        for figure in ("tokens_per_s", "load_ms", "peak_rss_bytes", "kernels"):
            assert before[figure] == after[figure]
        assert after["tokens_per_s"] > 0
    assert any("and so are speed and memory" in note for note in second["notes"])

    assert "Deviations" not in outcome.out
    *_, gained = outcome.out.partition("Gains and losses\n")
    assert "- Size: " in gained
    assert gained.endswith("PASS: tiny-reasoner for ci-smoke, bytes 1.00 of dense q8_0\n")

    *_, steps = outcome.err.partition("next:\n")
    commands = [shlex.split(line) for line in steps.splitlines()]
    named = [words[1] for words in commands]
    assert named == ["run", "chat", "serve", "verify", "bench", "report"]
    assert all(words[2] == str(again) for words in commands)


def test_dry_run_does_nothing(tmp_path: Path) -> None:
    """The plan is printed and no file appears."""
    outcome = racdeploy(
        "build", "--dry-run", "--json", "--work", tmp_path / "work", "--out", tmp_path / "bundle"
    )
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["evaluation_prompts"] == 200
    assert not list(tmp_path.iterdir())

"""How long sequences may be: what a model is made for bounds all that a bundle says of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy.manifest import Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import bundling
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_build
from racdeploy.recipe import Recipe
from tests.support.errors import raises
from tests.support.tiny_models import edit_json


def _asking(**verify: int) -> Job:
    return Job(Recipe.combine(None, {"verify": {"count": 12, **verify}, "tasks": ["gcd"]}))


def test_a_verification_takes_no_more_context_than_the_model_has() -> None:
    """The default yields to a model that is made for less, and a note says so."""
    job = _asking()
    assert job.verification.context_tokens == job.checkpoint.shape.max_positions == 1024
    note = "the model was made for 1,024 tokens, so it is verified with this context"
    assert note in job.input_notes
    told = _asking(context_tokens=512)
    assert told.verification.context_tokens == 512
    assert note not in told.input_notes


def test_the_verification_follows_the_traces(tmp_path: Path) -> None:
    """Room for a prompt and an answer as long as a trace; fewer sequences at once, in that room."""
    dense = shutil.copytree(Job(Recipe()).model.folder, tmp_path / "dense")
    edit_json(dense / "config.json", max_position_embeddings=131_072)
    job = Job(Recipe.combine(None, {"model": str(dense), "tasks": ["gcd"]}))
    settings = job.verification
    assert (settings.max_new_tokens, settings.context_tokens) == (1024, 2048)
    assert settings.parallel == 16

    longest = max(job.count_prompt_tokens("evaluation"))
    long = replace(job, answer_limit=100_000).verification
    assert (long.max_new_tokens, long.context_tokens) == (100_000, 100_001 + longest)
    assert 1 <= long.parallel < 16

    told = Job(Recipe.combine(None, {"verify": {"max_new_tokens": 3000}, "model": str(dense)}))
    asked = replace(told, answer_limit=100_000).verification
    assert asked.max_new_tokens == 3000
    assert 3000 < asked.context_tokens < 4000


def test_a_recipe_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    """Before any work, with the most that there is."""
    job = _asking(context_tokens=4096)
    named = ("4096", "tiny-reasoner", "--set verify.context_tokens=1024")
    with raises("context-beyond-model", *named):
        check_build(job, tmp_path / "bundle")
    check_build(_asking(), tmp_path / "bundle")


def _numbers(file: Path, lines: int) -> str:
    rows = [{"question": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(lines)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return f"jsonl:{file}"


def test_more_questions_than_there_are_cannot_be_asked(tmp_path: Path) -> None:
    """Refused before any work; who names no number gets what the file has."""
    tasks = [_numbers(tmp_path / "mine.jsonl", 30)]
    asked = {"tasks": tasks, "verify": {"count": 60}}
    with raises("too-few-questions", "--prompts asks 60", "120 different questions"):
        check_build(Job(Recipe.combine(None, asked)), tmp_path / "bundle")

    traced = {"tasks": tasks, "traces": {"count": 300}}
    with raises("too-few-questions", "--trace-prompts asks 300"):
        check_build(Job(Recipe.combine(None, traced)), tmp_path / "bundle")
    check_build(Job(Recipe.combine(None, {"tasks": tasks})), tmp_path / "bundle")


@pytest.mark.parametrize("full", ["out", "work"])
def test_a_disk_that_is_too_small_is_known_from_the_plan(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the bundle and that of the stages, by the first folder that exists."""
    folders = {name: tmp_path / name for name in ("out", "work")}
    for folder in folders.values():
        folder.mkdir()

    def usage(folder: Path) -> shutil._ntuple_diskusage:
        return shutil._ntuple_diskusage(0, 0, 10**5 if folder.name == full else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    job = _asking()
    with raises("disk-full", str(folders[full]), "0.1 MB free"):
        check_build(job, folders["out"] / "a" / "bundle", folders["work"] / "b")


def test_a_plan_has_room_and_answers_for_every_target() -> None:
    """A second target has a pruned model, an artifact and its copy of its own, and is asked too."""
    options = ({"tasks": ["gcd"], "also": also} for also in ((), ("onnx",)))
    jobs = [Job(Recipe.combine(None, each)) for each in options]
    alone, both = (check_build(job).artifact for job in jobs)
    assert alone
    assert both
    added_bytes = both.disk_bytes - alone.disk_bytes
    assert 2 * both.artifact_bytes < added_bytes < alone.disk_bytes
    assert both.evaluation_models == alone.evaluation_models + 1 == 3
    assert jobs[1].siblings[0].encoder is jobs[1].encoder, "a tokenizer is a process"


@pytest.mark.parametrize(
    ("positions", "target", "advised"),
    [(1024, "gguf", 1024), (131_072, "gguf", 16_384), (131_072, "raspberry-pi-5", 4096)],
)
def test_card_modelfile_and_manifest_name_one_context(
    contents: bundling.BundleContents, tmp_path: Path, positions: int, target: str, advised: int
) -> None:
    """As much as thoughts need, of what the model and its target have."""
    dense = Path(shutil.copytree(contents.model.folder, tmp_path / "dense"))
    edit_json(dense / "config.json", max_position_embeddings=positions)
    recipe = contents.job.recipe.model_copy(update={"model": str(dense), "target": target})
    told = replace(contents, job=Job(recipe))
    bundling.write_bundle(tmp_path / "bundle", told)

    generation = Manifest.read(tmp_path / "bundle").generation
    assert generation.advised_context_tokens == advised
    assert generation.model_context_tokens == positions
    assert generation.context_tokens == min(positions, 2048)

    modelfile = (tmp_path / "bundle" / "Modelfile").read_text(encoding="utf-8")
    assert re.findall(r"num_ctx (\d+)", modelfile) == [str(advised)]
    card = (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"--jinja -c (\d+)", card) == [str(advised)]
    assert re.findall(r"a context length of (\d+)", card) == [str(advised)]


def test_a_stretched_rope_counts(contents: bundling.BundleContents, tmp_path: Path) -> None:
    """Some configs leave the number of positions as it was before."""
    folder = Path(shutil.copytree(contents.model.folder, tmp_path / "model"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("rope_parameters", None)
    changed = config | {"max_position_embeddings": 256, "rope_scaling": yarn}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    assert Checkpoint(folder).shape.max_positions == 1024

"""kill -9 at twenty random moments of trace collection and pruning, and the refusal of changed inputs."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest

from racdeploy.artifacts import Stage
from racdeploy.checkpoint import file_sha256
from racdeploy.errors import ArtifactError
from racdeploy.job import Job
from racdeploy.pipeline import Build
from racdeploy.recipe import Recipe
from tests.tiny_models import make_checkpoint

KILLS = 20
OPTIONS = {
    "traces": {"count": 24, "batch": 4, "max_new_tokens": 24},
    "calibration": {"keep_truncated": True},
    "prune": {"allocation": "owl"},
}


def _prune(model: str, work: str) -> None:
    Build(Job(Recipe.combine(None, {"model": model, **OPTIONS})), Path(work), threads=1).prune()


def _contents(work: Path) -> dict[str, str]:
    files = [
        f for f in sorted(work.rglob("*")) if f.is_file() and f.name not in {".lock", "cost.json"}
    ]  # cost: seconds
    return {f.relative_to(work).as_posix(): file_sha256(f) for f in files if ".partial" not in f.name}


def test_twenty_kills_at_random_moments_leave_the_same_bytes(tmp_path: Path) -> None:
    """However often and wherever it dies, the last run ends with what an undisturbed one leaves."""
    model = make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=4, hidden_size=64, intermediate_size=192)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["racdeploy.pipeline", "racdeploy.prune.calibrate", "racdeploy.prune.cost"])

    def start(work: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_prune, args=(str(model), str(work)))
        process.start()
        return process

    start(tmp_path / "first").join()  # the server imports torch only once
    began = time.perf_counter()
    start(tmp_path / "whole").join()
    seconds = time.perf_counter() - began
    expected, generator, killed, rounds = _contents(tmp_path / "whole"), random.Random(0), 0, 0
    assert any(name.endswith("model.safetensors") for name in expected)
    while killed < KILLS:
        rounds += 1
        work = tmp_path / f"round-{rounds}"
        for _ in range(KILLS):
            process = start(work)
            process.join(generator.uniform(0, 0.7 * seconds))
            if process.exitcode is not None or killed == KILLS:
                break
            process.kill()
            process.join()
            killed += 1
        process.join()
        assert process.exitcode == 0
        assert expected == _contents(work)
    assert _contents(tmp_path / "first") == expected


@pytest.mark.parametrize("key", ["model", "prune", "traces_sha256", "code"])
def test_a_stage_made_from_other_inputs_is_refused_by_name(tmp_path: Path, key: str) -> None:
    """A folder whose record of model, recipe, traces or code is not what is asked is not gone on with."""
    inputs = {"model": "a", "prune": {"damping": 0.01, "method": "sparsegpt"}, "traces_sha256": "b", "code": "c"}
    inputs |= {"version": "1"}
    record = Stage.open(tmp_path, "prune", inputs).folder / "inputs.json"
    changed = json.loads(record.read_text())
    changed[key] = {"damping": 0.1, "method": "sparsegpt"} if key == "prune" else "other"
    record.write_text(json.dumps(changed))
    with pytest.raises(ArtifactError, match=f"changed: {'prune.damping' if key == 'prune' else key}\n"):
        Stage.open(tmp_path, "prune", inputs)
    assert Stage.at(tmp_path, "prune", changed).folder != record.parent, "other inputs have a folder of their own"

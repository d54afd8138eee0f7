"""kill -9 at random moments of trace collection and pruning, and under a recipe that is changed
after it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from racdeploy.files.writing import file_sha256
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from tests.support.commands import racdeploy
from tests.support.fork_server import fork_context
from tests.support.tiny_models import make_checkpoint

KILLS = 20
OPTIONS = {
    "traces": {"count": 24, "batch_size": 4, "max_new_tokens": 10},
    "calibration": {"keep_truncated": True},
    "structure": {"keep": {"ffn": 0.5, "heads": 0.75, "blocks": 0.75}},
    "prune": {"allocation": "error"},
}


def _prune(model: str, work: str) -> None:
    Build(Job(Recipe.combine(None, {"model": model, **OPTIONS})), Path(work), threads=1).prune()


def _prune_and_die(model: str, recipe: str, work: str, blocks: int = 1) -> None:
    """Prune until so many blocks are written."""

    def progress(label: str, done: int, total: int, tokens: int = 0) -> None:
        if label == "prune" and done == blocks:
            os.kill(os.getpid(), signal.SIGKILL)

    Build(Job(Recipe.combine(Path(recipe), {"model": model})), Path(work), 1, progress).prune()


def _contents(work: Path) -> dict[str, str]:
    files = [f for f in sorted(work.rglob("*")) if f.is_file() and f.name != ".lock"]
    return {f.relative_to(work).as_posix(): file_sha256(f) for f in files}


@pytest.mark.more
def test_kills_at_random_moments_leave_the_same_bytes(tmp_path: Path) -> None:
    """However often and wherever it dies, the last run ends with what an undisturbed one leaves."""
    model = make_checkpoint(
        tmp_path / "model", "qwen3", num_hidden_layers=4, hidden_size=64, intermediate_size=192
    )
    context = fork_context()

    def start(work: Path) -> BaseProcess:
        process = context.Process(target=_prune, args=(str(model), str(work)))
        process.start()
        return process

    start(tmp_path / "first").join()  # the server imports torch only once
    began = time.perf_counter()
    start(tmp_path / "whole").join()
    seconds = time.perf_counter() - began
    expected, generator, killed, rounds = _contents(tmp_path / "whole"), random.Random(0), 0, 0
    assert any(name.endswith("model.safetensors") for name in expected)
    assert not [name for name in expected if name.endswith("-00000.safetensors")]
    while killed < KILLS:
        rounds += 1
        work = tmp_path / f"round-{rounds}"
        while True:
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


@pytest.mark.slow
def test_experts_survive_a_kill_after_each_block(tmp_path: Path) -> None:
    """Which of them stayed, their tokens and their weights are those of an undisturbed run."""
    sizes = {"num_hidden_layers": 3, "num_experts": 8}
    model = make_checkpoint(tmp_path / "model", "qwen3_moe", **sizes)
    recipe = tmp_path / "recipe.toml"
    traces = "[traces]\ncount = 12\nmax_new_tokens = 24\n[calibration]\nkeep_truncated = true\n"
    cut = "[structure]\nkeep = {experts = 0.75}\n[prune]\nsparsity = 0.5\nexpert_tokens = 40\n"
    recipe.write_text(traces + cut)

    context = fork_context()
    for blocks in (1, 2):
        arguments = (str(model), str(recipe), str(tmp_path / "killed"), blocks)
        process = context.Process(target=_prune_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    for work in ("killed", "whole"):
        job = Job(Recipe.combine(recipe, {"model": str(model)}))
        Build(job, tmp_path / work, threads=1).prune()
    found = _contents(tmp_path / "killed")
    assert found == _contents(tmp_path / "whole")
    assert any(name.endswith("model.safetensors") for name in found)


def test_a_killed_run_whose_recipe_changed_begins_anew_and_says_so(tmp_path: Path) -> None:
    """The line names what changed; with the change undone, the run goes on with the blocks that it
    had.
    """
    model = make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=2, hidden_size=64)
    recipe, work = tmp_path / "recipe.toml", tmp_path / "work"
    arguments = ("prune", model, "--recipe", recipe, "--work", work, "--threads", 1)
    traces = "[traces]\ncount = 8\nmax_new_tokens = 24\n[calibration]\nkeep_truncated = true\n"
    traces += '[export]\nrounding = "nearest"\n'
    recipe.write_text(f"prune.damping = 0.01\n{traces}")
    process = fork_context().Process(
        target=_prune_and_die, args=(str(model), str(recipe), str(work))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (seen,) = work.glob("prune-*/block-00000.json")
    written = seen.stat().st_mtime_ns
    recipe.write_text(f"prune.damping = 0.02\n{traces}")
    changed = racdeploy(*arguments)
    assert changed.code == 0, changed.err
    assert (
        f"{seen.parent} was left unfinished, with other inputs: prune.damping 0.01 -> 0.02"
        in changed.err
    )
    assert f"rm -r {seen.parent}" in changed.err
    assert not changed.out.strip().startswith(str(seen.parent))
    recipe.write_text(f"prune.damping = 0.01\n{traces}")
    undone = racdeploy(*arguments)
    assert undone.code == 0, undone.err
    assert "unfinished" not in undone.err
    assert undone.out.strip().startswith(str(seen.parent))
    assert seen.stat().st_mtime_ns == written, "a finished block was pruned again"

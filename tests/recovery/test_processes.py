"""Several processes recover one model: what one process finds, but for the order of sums."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from racdeploy import recovery
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.phase_training import PhaseTrainer
from racdeploy.pipeline.recovery_phases import Phase
from racdeploy.pipeline.workspace import Workspace
from racdeploy.pruning.job_share import JobShare
from racdeploy.pruning.process_group import ProcessGroup, join_process_group
from racdeploy.quant.stored_codes import CODED_FILE, UNCODED_FILE
from racdeploy.recipe import Recovery
from racdeploy.recovery import training, training_batches
from racdeploy.recovery.parameters import ScaleParameters
from racdeploy.recovery.training_batches import split_evenly
from racdeploy.recovery.training_log import LogRow
from racdeploy.recovery.training_run import STATE_FILE, TrainingRun
from racdeploy.runtime.template import PromptEncoder
from tests.support.codes import draw_codes, read_as_file, read_stored_weights, store_codes
from tests.support.commands import environment
from tests.support.errors import raises
from tests.support.fork_server import fork_context
from tests.support.job_recipes import RECOVERY
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_training_run import make_training_run, read_weights

pytestmark = pytest.mark.more

FORMATS = {"full": "", "scales codes": "q4_0", "blockwise": ""}
"""Each method, and the number format whose codes were chosen while pruning."""

TOKENS = 800
FEATURES = 129  # no two processes can share these evenly
BATCH_TOKENS = 40  # three or four batches make up a step


def _make_run(folder: Path, job: str) -> TrainingRun:
    quant = FORMATS[job]
    settings = {"learning_rate": 2e-4} if quant else {}
    folder.mkdir(parents=True)

    width = FEATURES if not quant else 128
    training_run = make_training_run(
        folder, tokens=TOKENS, quant=quant, settings=settings, intermediate_size=width
    )
    return replace(
        training_run, held_out=training_run.held_out[:4]
    )  # few enough to be looked at every step


def _again(training_run: TrainingRun, name: str) -> TrainingRun:
    """Return the same training run, to be taken in folders of its own."""
    folder = training_run.out.parent / name
    folder.mkdir()
    (folder / "phase").mkdir()
    return replace(training_run, folder=folder / "phase", out=folder / "recovered")


def _variables(rank: int, count: int, port: int = 1) -> dict[str, str]:
    """Return what torchrun tells a process."""
    told = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in told.items()}


def _start(count: int, target: Any, *arguments: Any) -> list[Any]:
    """Start a function in several processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    context = fork_context()
    started = []

    for rank in range(count):
        variables = _variables(rank, count, port)
        process = context.Process(target=target, args=(variables, *arguments))
        process.start()
        started.append(process)

    return started


def _finish(started: Sequence[Any]) -> list[int]:
    for process in started:
        process.join(240)
    return [process.exitcode for process in started]


def _teach(
    variables: dict[str, str], training_runs: dict[str, TrainingRun], dies_at: float = 2.0
) -> None:
    """Recover some models; kill this process at a share of the tokens."""
    os.environ |= variables
    torch.set_num_threads(1)

    def die(label: str, done: int, total: int, tokens: int = 0) -> None:
        if done >= dies_at * total:
            os.kill(os.getpid(), signal.SIGKILL)

    with join_process_group() as processes:
        for job, training_run in training_runs.items():
            own = (
                training_run.folder
                if processes.is_first
                else training_run.folder / f"of-{processes.rank}"
            )
            own.mkdir(exist_ok=True)
            training_run = replace(
                training_run, folder=own, share=JobShare(processes), progress=die
            )
            _learn(job, training_run)

        if not processes.is_first:
            assert not list(processes.receive_jobs(dict)), "it waits until the first one ends"


def _learn(job: str, training_run: TrainingRun) -> None:
    """Recover a model; what was seen is a file beside it."""
    norms: list[float] = []
    inside: Any = training
    measured = inside.gradient_norm

    def note(weights: Any) -> float:
        norms.append(measured(weights))
        return norms[-1]

    inside.gradient_norm = note
    training_batches.MICRO_BATCH_TOKENS = BATCH_TOKENS
    looks = recovery.load(job.split()[0]).recover(training_run)
    inside.gradient_norm = measured

    squares = training_run.share.list_all([norm**2 for norm in norms])
    if training_run.share.has_files:
        training_run.write()
        seen = {"looks": [asdict(look) for look in looks], "squares": squares}
        (training_run.out.parent / "seen.json").write_text(json.dumps(seen))


def _looks(folder: Path) -> list[LogRow]:
    return [LogRow(**look) for look in json.loads((folder / "seen.json").read_text())["looks"]]


def _norms(folder: Path) -> list[float]:
    """Return the length of the gradient of every step, over all processes."""
    squares = json.loads((folder / "seen.json").read_text())["squares"]
    return [sum(step) ** 0.5 for step in zip(*squares, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job done by this process, by one that torchrun started, and by two."""
    folder = tmp_path_factory.mktemp("processes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    training_runs = {job: _make_run(folder / job, job) for job in FORMATS}
    two = {job: _again(training_run, "two") for job, training_run in training_runs.items()}
    started = _start(2, _teach, two)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_batches, "MICRO_BATCH_TOKENS", BATCH_TOKENS)
        for job, training_run in training_runs.items():
            _learn(job, _again(training_run, "alone"))

        for name, value in _variables(0, 1).items():
            patch.setenv(name, value)
        with join_process_group() as processes:
            for job, training_run in training_runs.items():
                _learn(job, replace(_again(training_run, "one"), share=JobShare(processes)))

    assert _finish(started) == [0, 0]
    torch.set_num_threads(threads)
    return folder


def _moves(folder: Path, job: str, name: str) -> dict[str, torch.Tensor]:
    """Return how far every weight came from where it was."""
    before = read_weights(folder / job / "sparse")
    after = read_weights(folder / job / name / "recovered")
    return {name: after[name].float() - before[name].float() for name in before}


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return how far two moves are apart, relative to their length, of all weights together."""
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    length = sum(float(value.square().sum()) for value in expected.values())
    return float((apart / length) ** 0.5)


@pytest.mark.parametrize("job", FORMATS)
def test_one_process_of_torchrun_leaves_the_same_bytes(folder: Path, job: str) -> None:
    """As a run that knows of no processes."""
    alone, one = (folder / job / name for name in ("alone", "one"))
    models = (CODED_FILE, UNCODED_FILE) if FORMATS[job] else ("model.safetensors",)
    for file in (*(f"recovered/{model}" for model in models), "seen.json"):
        assert (alone / file).read_bytes() == (one / file).read_bytes()


@pytest.mark.parametrize("job", FORMATS)
def test_two_processes_find_what_one_does(folder: Path, job: str) -> None:
    """Sums are in another order, so a moment, which has two bytes, may be rounded the other way.

    At most, all roundings of the two runs are independent: each is 1 % of a move away from one
    without them (see test_optimizer.py), so both are √2 % apart.
    """
    found = _moves(folder, job, "two")
    assert _distance(found, _moves(folder, job, "alone")) < 0.014

    start, *_, end = _looks(folder / job / "two")
    alone, *_, alone_end = _looks(folder / job / "alone")
    # The first look differs by float32 sums of a few hundred numbers, 2⁻²⁴ each.
    assert start.kl_nats == pytest.approx(alone.kl_nats, rel=1e-5)
    # What was gained is at most as far apart as the moves, to first order.
    assert end.kl_nats == pytest.approx(alone_end.kl_nats, rel=0.014)
    assert (start.tokens, end.tokens) == (alone.tokens, alone_end.tokens)


@pytest.mark.parametrize("job", [job for job in FORMATS if job != "blockwise"])
def test_gradients_are_those_of_the_whole_step(folder: Path, job: str) -> None:
    """Neither their mean over processes nor a share: Adam would hide a factor, the norm shows it.

    A sum of n = 100 tokens moves by n · 2⁻²⁴ = 6e-6 of itself at most in another order.
    """
    found, expected = _norms(folder / job / "two"), _norms(folder / job / "alone")
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=6e-6)


@pytest.mark.parametrize("job", FORMATS)
def test_zeros_and_grids_stay(folder: Path, job: str) -> None:
    """To the last bit, though no process has seen a whole mask."""
    before = read_weights(folder / job / "sparse")
    after = read_weights(folder / job / "two" / "recovered")
    masked = Checkpoint(folder / job / "sparse").shape.prunable_weights
    stored = read_stored_weights(folder / job / "two" / "recovered")

    for name in masked:
        assert not after[name][before[name] == 0].any()
        if FORMATS[job]:
            assert np.array_equal(stored[name], after[name].numpy())

    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_killed_together_they_resume_in_any_number(folder: Path) -> None:
    """Killed after half of the tokens, and resumed by one process or by two."""
    training_run = _make_run(folder / "killed", "full")
    exits = _finish(_start(2, _teach, {"full": training_run}, 0.5))
    assert exits[0] == -signal.SIGKILL

    again = {count: _again(training_run, f"by-{count}") for count in (1, 2)}
    for other in again.values():
        shutil.rmtree(other.folder)
        shutil.copytree(training_run.folder, other.folder)
        assert (other.folder / STATE_FILE).is_file()

    _learn("full", again[1])
    assert _finish(_start(2, _teach, {"full": again[2]})) == [0, 0]

    expected = _moves(folder, "full", "alone")
    for count, other in again.items():
        seen = other.out.parent
        assert len(_norms(seen)) < len(_norms(folder / "full" / "alone")), "it began in the middle"

        after = read_weights(other.out)
        before = read_weights(folder / "full" / "sparse")
        found = {name: after[name] - before[name] for name in before}
        assert _distance(found, expected) < 0.014, count


@pytest.mark.slow
def test_three_processes_share_rows_that_do_not_divide(folder: Path) -> None:
    """Of 129 channels, of 32 hidden numbers and of 10 batches none has as many as the others."""
    three = _again(_make_run(folder / "uneven", "full"), "three")
    assert _finish(_start(3, _teach, {"full": three})) == [0, 0, 0]
    expected = _moves(folder, "full", "alone")
    assert _distance(_moves(folder / "uneven", ".", "three"), expected) < 0.014


def test_a_lost_process_is_said_to_be_lost(tmp_path: Path) -> None:
    """Wherever in the model torch waited for it."""
    training_run = _make_run(tmp_path / "lost", "full")
    exits = _finish(_start(2, _teach_until_alone, training_run))
    assert exits == [0, -signal.SIGKILL]


def _teach_until_alone(variables: dict[str, str], training_run: TrainingRun) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    calls = 0

    def die(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return measured(*given, **named)

    inside: Any = training
    measured = inside.kl_and_gradient
    inside.kl_and_gradient = die

    with raises("lost-process"), join_process_group() as processes:
        own = training_run.folder / f"of-{processes.rank}"
        own.mkdir()
        recovery.load("full").recover(replace(training_run, folder=own, share=JobShare(processes)))


def test_batches_are_split_until_no_process_is_idle() -> None:
    """The longest first; what is taken together is of like size; one process changes nothing."""
    lengths = [10, 10, 4, 4, 4, 4, 1]
    batches = [[2, 3, 4, 5], [0, 1], [6]]
    assert split_evenly(batches, lengths, 1) == batches
    assert split_evenly(batches, lengths, 2) == [[2, 3, 4, 5], [0], [1], [6]]
    assert split_evenly([[0]], lengths, 4) == [[0]]


class _Differing(ProcessGroup):
    """The first of two processes, of which the other one says no."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def all_gather(self, value: Any) -> list[Any]:
        return [value, False]

    def broadcast_object(self, value: Any, owner: int = 0) -> Any:
        return value

    def scatter_rows(self, all_rows: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        assert all_rows is not None
        return all_rows


def test_rows_are_on_a_grid_where_all_rows_are(tmp_path: Path) -> None:
    """What one process has of a linear does not decide."""
    codes = draw_codes("q8_0", 2, 64)
    weight_OI = torch.from_numpy(read_as_file("q8_0", codes))
    stored = store_codes(tmp_path, "w", "q8_0", codes)
    assert ScaleParameters({"w": weight_OI}, stored).parameters
    assert ScaleParameters({"w": weight_OI}, stored, JobShare(_Differing())).parameters == {}


def test_a_process_may_have_no_rows(tmp_path: Path) -> None:
    """Where there are more processes than a linear can be cut for."""
    weight_OI = torch.zeros(0, 64)
    stored = store_codes(tmp_path, "w", "q4_0", draw_codes("q4_0", 0, 64))
    variables = ScaleParameters({"w": weight_OI}, stored)
    weight_OI.grad = torch.zeros(0, 64)
    variables.weights["w"] = weight_OI
    variables.propagate_gradients()
    variables.update_weights()
    assert len(variables.parameters["w"]) == 0


def test_a_process_without_the_pruned_model_ends_the_job(tmp_path: Path) -> None:
    """The error names the folder, and what several machines need."""
    dense = Checkpoint(make_checkpoint(tmp_path / "model", "llama"))
    place = Workspace(tmp_path / "work", 1, None, _Differing())
    encoder = PromptEncoder.from_folder(dense.folder)
    trainer = PhaseTrainer(place, dense, encoder, Recovery())

    phase = Phase("full", "full", is_on_policy=False, tokens=100)
    request = replace(
        trainer.prepare(dense.folder, (), ()), sparse_sha256=dense.sha256, phase=phase
    )
    with raises("work-folder-not-shared", "process 1 ", str(dense.folder)):
        trainer.train(tmp_path, "model", request)


@pytest.mark.slow
def test_torchrun_prunes_and_recovers(tmp_path: Path) -> None:
    """From the command line to a model that was recovered, and nothing of the others is left."""
    make_checkpoint(
        tmp_path / "model", "qwen3", num_hidden_layers=2, hidden_size=64, intermediate_size=192
    )
    (tmp_path / "recipe.toml").write_text(RECOVERY)

    work = tmp_path / "work"
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["-m", "racdeploy", "prune", str(tmp_path / "model"), "--work", str(work)]
    run += ["--recipe", str(tmp_path / "recipe.toml"), "--recover-tokens", "3000"]
    run += ["--sparsity", "0.7"]

    done = subprocess.run(run, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "recover-" in done.stdout
    assert len(list(work.glob("recover-*/stage.json"))) == 2
    assert not list(work.glob("scratch-*"))

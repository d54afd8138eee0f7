"""Several processes do one job: the same bytes as one, and a clear end where one is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import racdeploy
from racdeploy.files.writing import file_sha256
from racdeploy.pipeline import workspace
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pruning.device import CPU
from racdeploy.pruning.job_share import JobShare
from racdeploy.pruning.process_group import ProcessGroup
from racdeploy.pruning.walk.statistics import InputStatistic
from racdeploy.recipe import Recipe
from tests.support.commands import command_with_torch, environment, find_error_code
from tests.support.job_recipes import TRACES
from tests.support.tiny_models import make_checkpoint
from tests.support.waiting import wait_for

pytestmark = pytest.mark.more

RECIPE_OF_TRACES = {"traces": {"count": 24, "batch_size": 5, "max_new_tokens": 12}}
UNDER_TORCH = {"traces": RECIPE_OF_TRACES["traces"] | {"engine": "transformers"}}
SERVED = {"traces": {"server": "http://127.0.0.1:1/v1"}}
PLAIN = 'prune.allocation = "error"\n'
CUT = "structure.keep = {ffn = 0.5, heads = 0.75, blocks = 0.5}\n"
EXPERTS = "prune.sparsity = 0.5\nprune.expert_tokens = 60\nstructure.keep = {experts = 0.75}\n"
OPTIMIZED = (
    'export.rounding = "optimized"\nprune.target = "linear_output"\n'
    'prune.ignore = ["0.mlp.up_proj"]\n'
)


def _model(folder: Path, settings: str, blocks: int = 2) -> Path:
    sizes = {"num_hidden_layers": blocks, "hidden_size": 64, "intermediate_size": 192}
    family = "qwen3_moe" if settings == EXPERTS else "qwen3"
    make_checkpoint(folder / "model", family, **sizes)
    (folder / "recipe.toml").write_text(settings + TRACES)
    return folder / "model"


def _arguments(folder: Path, work: str) -> list[object]:
    recipe = ("--recipe", folder / "recipe.toml")
    return ["prune", folder / "model", *recipe, "--work", folder / work, "--threads", 1]


def _alone(folder: Path, work: str = "alone") -> dict[str, str]:
    """Prune in this process."""
    recipe = folder / "recipe.toml"
    racdeploy.prune(str(folder / "model"), recipe=recipe, work=folder / work, threads=1)
    return _contents(folder / work)


def _start(
    folder: Path, work: str, count: int, models: list[Path] | None = None
) -> list[subprocess.Popen[str]]:
    """Start the processes of a job as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        variables = {
            "RANK": rank,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        arguments = _arguments(folder, work)
        arguments[1] = models[rank] if models else arguments[1]
        started.append(
            subprocess.Popen(
                command_with_torch(*arguments),
                env=environment(**{name: str(value) for name, value in variables.items()}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def _finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=300) for process in processes]
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


def _contents(work: Path) -> dict[str, str]:
    files = [f for f in sorted(work.rglob("*")) if f.is_file() and f.name != ".lock"]
    return {f.relative_to(work).as_posix(): file_sha256(f) for f in files}


def test_work_is_shared_out_evenly_and_once() -> None:
    """The largest piece first, to whoever has least; too many processes leave some without."""
    shares = [JobShare(ProcessGroup(rank, 3)) for rank in range(3)]

    def list_owned(costs: Sequence[int]) -> list[list[int]]:
        return [share.list_owned(share.assign_owners(costs)) for share in shares]

    assert list_owned([5, 1, 9, 4, 4, 1]) == [[2], [0, 1, 5], [3, 4]]
    assert list_owned([7]) == [[0], [], []]


def test_the_sum_does_not_depend_on_the_order_of_the_batches() -> None:
    """Bit for bit, with a thousandfold spread of magnitudes; sums in float32 do depend on it."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, 50, 40, generator=generator) * 1000 ** (i / 8) for i in range(9)]
    segment_BT = torch.ones(1, 50, dtype=torch.long)
    matrices, singles = [], []
    for order in (batches, batches[::-1], batches[3:] + batches[:3]):
        statistic = InputStatistic(40, CPU)
        single_II = torch.zeros(40, 40)
        for batch_BTI in order:
            statistic.add(batch_BTI, None, segment_BT)
            single_II += batch_BTI[0].T @ batch_BTI[0]
        matrices.append(statistic.hessian(0.01).matrix_II)
        singles.append(single_II)
    assert all(torch.equal(matrices[0], other) for other in matrices)
    assert not torch.equal(singles[0], singles[1])


def test_two_processes_leave_the_bytes_of_one(tmp_path: Path) -> None:
    """Traces, allocation, weights, importance and every reported number."""
    _model(tmp_path, PLAIN)
    processes = _start(tmp_path, "two", 2)
    expected = _alone(tmp_path)
    done = _finish(processes)
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[0][1].strip().startswith(str(tmp_path / "two"))
    assert not done[1][1], "only the first process prints the result"
    assert expected == _contents(tmp_path / "two")
    assert any(name.endswith("model.safetensors") for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, OPTIMIZED, CUT, EXPERTS])
def test_three_processes_leave_the_bytes_of_one(tmp_path: Path, settings: str) -> None:
    """Again with chosen codes, with one linear left dense, and with experts."""
    _model(tmp_path, settings)
    processes = _start(tmp_path, "three", 3)
    expected = _alone(tmp_path)
    done = _finish(processes)
    assert [code for code, _, _ in done] == [0, 0, 0], done
    assert expected == _contents(tmp_path / "three")


@pytest.mark.slow
def test_a_lost_process_ends_the_job_and_one_process_goes_on(tmp_path: Path) -> None:
    """The first one says what happened and what to do; what it finished is used, by any number of
    processes.
    """
    _model(tmp_path, PLAIN, blocks=6)
    processes = _start(tmp_path, "lost", 2)
    written = (tmp_path / "lost").glob
    wait_for(lambda: [*written("prune-*/block-00001.json")], "the second block", processes[0])
    processes[1].send_signal(signal.SIGKILL)
    (code, _, errors), _ = _finish(processes)
    assert code == 4
    assert "Traceback" not in errors
    assert "lost another process of this job" in errors
    assert "run the same command again" in errors
    shutil.copytree(tmp_path / "lost", tmp_path / "other")
    finished = {
        f.name: f.stat().st_mtime_ns for f in tmp_path.glob("lost/prune-*/block-0000[01].json")
    }
    again = _finish(_start(tmp_path, "other", 2))
    assert [code for code, _, _ in again] == [0, 0], again
    assert _alone(tmp_path, "lost") == _alone(tmp_path, "whole") == _contents(tmp_path / "other")
    assert finished == {
        f.name: f.stat().st_mtime_ns for f in tmp_path.glob("lost/prune-*/block-0000[01].json")
    }


@pytest.mark.slow
def test_torchrun_tells_of_a_killed_process_in_one_message_and_goes_on(tmp_path: Path) -> None:
    """Torchrun ends the others, whose message no traceback breaks into; what the killed one left
    goes with the next.
    """
    _model(tmp_path, PLAIN, blocks=6)
    work = tmp_path / "work"
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "racdeploy",
    ]
    run += map(str, _arguments(tmp_path, "work"))
    with subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as job:
        wait_for(lambda: [*work.glob("prune-*/block-00001.json")], "the second block", job)
        os.kill(_process_of_rank(job.pid, 1), signal.SIGKILL)
        _, errors = job.communicate(timeout=300)
    assert job.returncode == 1
    assert errors.count("run the same command again, it resumes at the first missing block") == 1
    assert find_error_code(errors) in ("lost-process", "stopped-by-torchrun")
    assert "[rank0]" not in errors, "torch prints a traceback that no one caught with this in front"
    assert "Exception ignored" not in errors
    assert len(list(work.glob("scratch-of-process-1-*"))) == 1
    done = subprocess.run(run, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert _alone(tmp_path) == _contents(work)


def _process_of_rank(parent: int, rank: int) -> int:
    """Return the number of the process that torchrun started as this rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


@pytest.mark.slow
def test_another_model_on_one_machine_ends_the_job_with_that_reason(tmp_path: Path) -> None:
    """The process that differs says so, the first one that it is lost."""
    _model(tmp_path, PLAIN)
    other = make_checkpoint(
        tmp_path / "other", "qwen3", num_hidden_layers=2, hidden_size=64, seed=1
    )
    (_, _, first), (code, _, second) = _finish(
        _start(tmp_path, "mixed", 2, [tmp_path / "model", other])
    )
    assert code == 2
    assert "process 1 is not like the first one; they differ in model" in second
    assert "lost another process of this job" in first


class _Two(ProcessGroup):
    """The first of two processes, of which the other one can read the model or not; this one does
    its work too.
    """

    def __init__(self, other_reads_it: bool) -> None:
        super().__init__(0, 2)
        self.other_reads_it, self.shared = other_reads_it, list[int]()

    def broadcast_object(self, value: Any, owner: int = 0) -> Any:
        return value

    def all_gather(self, value: Any) -> list[Any]:
        return [value, self.other_reads_it]

    @contextmanager
    def share_calls(self, do: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
        def call(items: Sequence[Any]) -> list[Any]:
            self.shared.append(len(items))
            return [do(item) for item in items]

        yield call


@pytest.mark.parametrize(("reads", "shared"), [(True, [2, 2, 1]), (False, [])])
def test_traces_of_a_sparse_model_are_shared_out_where_all_can_read_it(
    tmp_path: Path, reads: bool, shared: list[int]
) -> None:
    """Five shards by two processes, or by the first alone; the traces are the same."""
    recipe = Recipe.combine(None, {"model": str(_model(tmp_path, "")), **RECIPE_OF_TRACES})
    sparse = make_checkpoint(
        tmp_path / "sparse", "qwen3", num_hidden_layers=2, hidden_size=64, seed=1
    )
    processes = _Two(reads)
    _, traces = Build(Job(recipe), tmp_path / "work", 1, None, processes).trace_stage.run(sparse)
    assert processes.shared == shared
    assert traces == Build(Job(recipe), tmp_path / "alone", 1).trace_stage.run(sparse)[1]


def test_another_torch_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces of two versions are never in one folder; a server's do not depend on this machine's
    torch.
    """
    model = {"model": str(_model(tmp_path, ""))}
    job, served = (Job(Recipe.combine(None, model | traces)) for traces in (UNDER_TORCH, SERVED))
    before, before_served = (
        Build(j, tmp_path).trace_stage.inputs(j.checkpoint) for j in (job, served)
    )
    monkeypatch.setattr(workspace, "installed_version", lambda name: f"{name} of another day")
    after, after_served = (
        Build(j, tmp_path).trace_stage.inputs(j.checkpoint) for j in (job, served)
    )
    assert {key for key in before if before[key] != after[key]} == {"torch", "transformers"}
    assert before_served == after_served


def test_a_command_that_cannot_run_lets_the_others_go(tmp_path: Path) -> None:
    """A wrong option is said once, and nobody waits for a job that never comes."""
    _model(tmp_path, 'prune.ignore = ["nothing"]\n')
    first, second = _finish(_start(tmp_path, "work", 2))
    assert first[0] == 2
    assert "matches no linear" in first[2]
    assert second == (0, "", "")

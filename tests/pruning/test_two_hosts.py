"""Two hosts do one job: network namespaces with an address and a host name of their own each.

Both host names resolve to 127.0.1.1, as Debian's installer writes it. The product needs neither
``ip`` nor root; these tests do, and say so where they have none.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from racdeploy.files.writing import file_sha256
from tests.support.commands import environment, find_error_code
from tests.support.job_recipes import RECOVERY
from tests.support.tiny_models import make_checkpoint
from tests.support.waiting import wait_for

RECIPE = f"{RECOVERY}[prune]\nsparsity = 0.7\n"
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
FOUND_S = 60
ENVIRONMENT = environment(OMP_NUM_THREADS="1")


class TwoHosts:
    """Two network namespaces, joined by a cable."""

    def __init__(self) -> None:
        self.names = [f"rac{os.getpid()}{end}" for end in "ab"]
        self.cables = [f"{name}-eth" for name in self.names]

    def lay(self) -> None:
        """Make both hosts and the cable between them."""
        for name in self.names:
            _ip("netns", "add", name)
            (Path("/etc/netns") / name).mkdir(parents=True)
            (Path("/etc/netns") / name / "hosts").write_text(HOSTS.format(name=name))

        near, far = self.cables
        _ip("link", "add", near, "type", "veth", "peer", "name", far)
        for number, (name, cable) in enumerate(zip(self.names, self.cables, strict=True), 1):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "address", "add", f"10.87.0.{number}/24", "dev", cable)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", cable, "up")

    def remove(self) -> None:
        """Remove what there is of both hosts; the cable goes with them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def cut(self) -> None:
        """Take the link down on the second host."""
        _ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def tell_name(self, master: str) -> str:
        """Return the address of the first host; by name, the second host is told that."""
        if master != "by name":
            return master
        with (Path("/etc/netns") / self.names[1] / "hosts").open("a") as known:
            known.write(f"10.87.0.1 {self.names[0]}\n")
        return self.names[0]

    def start(self, arguments: list[str], master: str = "10.87.0.1") -> list[subprocess.Popen[str]]:
        """Start a command with torchrun on both hosts, as docs/pruning.md says."""
        return [
            subprocess.Popen(
                self._enter(name)
                + _torchrun("--nnodes", "2", "--node-rank", str(rank), "--master-addr", master)
                + arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
            for rank, name in enumerate(self.names)
        ]

    def _enter(self, name: str) -> list[str]:
        script = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script, name]


def _torchrun(*options: str) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--master-port", "29511", *options]
    return [*run, "-m", "racdeploy"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    """Two joined hosts, where this user may make them."""
    lacking = [name for name in ("ip", "unshare", "hostname") if not shutil.which(name)]
    if sys.platform != "linux" or lacking or os.geteuid() != 0:
        pytest.skip("needs root on Linux, with ip, unshare and hostname, to make two hosts")

    hosts = TwoHosts()
    try:
        hosts.lay()
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel or container makes no second host: {error.stderr.strip()}")
    finally:
        hosts.remove()


def _arguments(folder: Path, work: str) -> list[str]:
    if not (folder / "model").exists():
        make_checkpoint(
            folder / "model", "qwen3", num_hidden_layers=6, hidden_size=64, intermediate_size=192
        )
        (folder / "recipe.toml").write_text(RECIPE)

    recipe = ["--recipe", str(folder / "recipe.toml"), "--recover-tokens", "3000"]
    return ["prune", str(folder / "model"), *recipe, "--work", str(folder / work), "--threads", "1"]


def _contents(work: Path, stage: str) -> dict[str, str]:
    files = [f for f in sorted(work.glob(f"{stage}-*/**/*")) if f.is_file() and f.name != ".lock"]
    return {f.relative_to(work).as_posix(): file_sha256(f) for f in files}


def _finish(started: list[subprocess.Popen[str]], within_s: float) -> list[tuple[int, str]]:
    """Return exit code and errors of each."""
    end = time.monotonic() + within_s
    try:
        errors = [job.communicate(timeout=end - time.monotonic())[1] for job in started]
        return [(job.returncode, text) for job, text in zip(started, errors, strict=True)]
    finally:
        for job in started:
            job.terminate()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that one process pruned and recovered, and two processes of one host."""
    folder = tmp_path_factory.mktemp("hosts")
    _run([sys.executable, "-m", "racdeploy", *_arguments(folder, "alone")])
    _run([*_torchrun("--nproc-per-node", "2"), *_arguments(folder, "two")])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("master", ["10.87.0.1", "by name"])
def test_two_hosts_leave_the_bytes_of_one(hosts: TwoHosts, folder: Path, master: str) -> None:
    """Traces and pruned model; recovery, whose sums have another order, those of two processes."""
    work = master.replace(" ", "-")
    started = hosts.start(_arguments(folder, work), hosts.tell_name(master))
    done = _finish(started, 300)
    assert [code for code, _ in done] == [0, 0], done

    for stage in ("traces", "prune"):
        assert _contents(folder / work, stage) == _contents(folder / "alone", stage) != {}
    assert _contents(folder / work, "recover") == _contents(folder / "two", "recover") != {}


CUTS = {
    "traces-*/shard-00000.jsonl": "traces-*/stage.json",
    "prune-*/block-00001.json": "recover-*",
    "recover-*/inputs.json": "recover-*/block-00000.json",
    "recover-*/block-00001.json": "recover-*/model*",
}
"""When the cable is cut, and what appears too late for that."""


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_cable_ends_both_hosts_and_one_resumes(
    hosts: TwoHosts, folder: Path, tmp_path: Path, cut: str
) -> None:
    """Each names the other one; the line that the first prints leaves the bytes of one process."""
    work = tmp_path / "cut"
    started = hosts.start(_arguments(folder, str(work)))
    wait_for(lambda: [*work.glob(cut)], cut, started[0])
    hosts.cut()

    (first, errors), (second, other_errors) = _finish(started, FOUND_S)
    assert (first, second) == (1, 1), "of torchrun, where a process fails"
    assert find_error_code(errors) == find_error_code(other_errors) == "silent-process"
    assert f"process 1 ({hosts.names[1]} 10.87.0.2): no sign of life" in errors
    assert f"process 0 ({hosts.names[0]} 10.87.0.1): no sign of life" in other_errors
    assert not list(work.glob(CUTS[cut])), "the cable was cut too late"

    line = errors.partition("On the first one alone: ")[2].splitlines()[0]
    _run(shlex.split(line))
    for stage in ("traces", "prune"):
        assert _contents(work, stage) == _contents(folder / "alone", stage) != {}

    # What both had recovered before the cut stays.
    alone, two, resumed = (
        _contents(path, "recover") for path in (folder / "alone", folder / "two", work)
    )
    assert resumed.keys() == alone.keys()
    assert resumed.items() <= alone.items() | two.items()

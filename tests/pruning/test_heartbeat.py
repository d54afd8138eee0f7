"""A process that falls silent ends the others with its name; hosts find the way to each other."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from racdeploy.errors import EngineError
from racdeploy.pruning import heartbeat
from racdeploy.pruning.process_group import join_process_group
from tests.support.fork_server import fork_context

BEAT_S = 0.4
ADDRESSES = {"node0": "127.0.1.1", "10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.1"}
"""What the host node0, 10.0.0.1, finds as its own address on the way to another one."""


def _wait(variables: dict[str, str], stopped: str, folder: Path) -> None:
    """Wait for all others; one process is stopped, and the last one computes without Python."""
    os.environ |= variables
    torch.set_num_threads(1)
    heartbeat._BEAT_S, heartbeat._GRACE_S = BEAT_S, 2 * BEAT_S
    rank = variables["RANK"]
    sys.stderr = (folder / rank).open("w", buffering=1)

    try:
        with join_process_group() as processes:
            processes.all_gather(0)
            if rank == stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            if rank == "2":
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # lets other threads run, no signal
            processes.all_gather(0)
    except EngineError as error:
        sys.stderr.write(f"{error.code}: {error}")
        sys.exit(error.exit_code)


@pytest.mark.parametrize("stopped", ["0", "1"])
def test_a_stopped_process_ends_all_others_with_its_name(tmp_path: Path, stopped: str) -> None:
    """The first one has the store too; one that gloo keeps waiting, and one that computes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    told = {"WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = []
    for rank in "012":
        arguments = (told | {"RANK": rank}, stopped, tmp_path)
        started.append(fork_context().Process(target=_wait, args=arguments))
        started[-1].start()

    others = [process for rank, process in zip("012", started, strict=True) if rank != stopped]
    for process in others:
        process.join(60)
    for process in started:
        process.kill()

    assert [process.exitcode for process in others] == [EngineError.exit_code] * 2
    for rank in {"0", "1", "2"} - {stopped}:
        printed = (tmp_path / rank).read_text()
        assert "silent-process" in printed
        assert f"process {stopped} ({socket.gethostname()} 127.0.0.1): no sign of life" in printed
        assert "run the same command again" in printed


class _Store(dict[str, str]):
    """torchrun's store, in which another host has left its address."""

    set = dict.__setitem__

    def get(self, key: str, default: Any = None) -> Any:
        return self[key].encode()


@pytest.mark.parametrize(
    ("master", "other", "named", "chosen"),
    [
        ("10.0.0.1", "10.0.0.2", None, "eth7"),
        ("node0", "10.0.0.2", None, "eth7"),
        ("node0", "127.0.1.1", None, None),
        ("node0", "10.0.0.2", "ib0", "ib0"),
    ],
)
def test_the_interface_to_other_hosts_is_used(
    monkeypatch: pytest.MonkeyPatch, master: str, other: str, named: str | None, chosen: str | None
) -> None:
    """Also where a host finds 127.0.1.1 under its own name; not on one host, nor a named one."""
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named or "")
    if not named:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(heartbeat, "_find_route", lambda to: (ADDRESSES[to], "eth7"))

    hosts = heartbeat.choose_interface(_Store({"host-1": f"node1 {other}"}), 0, 2)
    assert hosts == [f"{socket.gethostname()} {ADDRESSES[master]}", f"node1 {other}"]
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell an interface")
def test_the_route_to_this_host_is_the_loopback_interface() -> None:
    assert heartbeat._find_route("localhost") == ("127.0.0.1", "lo")

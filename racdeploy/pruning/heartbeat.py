"""Connection of a job's processes: the network interface to other hosts, and lost processes.

gloo's time limit cannot find these: the others wait for hours while the first process exports.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from racdeploy.errors import EngineError, EnvironmentFailure

if sys.platform == "linux":
    import fcntl

_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_OPEN_FILES = Path("/dev/fd")
_BEAT_S = 5.0
_LIMIT = 6  # missed beats: all others have found a silent process after 40 s
_SUSPECT = 3
_GRACE_S = 10.0


@contextmanager
def watch_processes(store: Any, rank: int, hosts: list[str]) -> Iterator[None]:
    """Raise an error that names another process of the job if one falls silent.

    Raises:
        EngineError: a process is silent, or gloo lost one while others are silent.
    """
    heartbeat = _Heartbeat(store, rank, hosts)
    try:
        yield
    except (EnvironmentFailure, OSError) as error:
        if silence := heartbeat.describe_silence():
            raise silence from error
        raise
    finally:
        heartbeat.ended.set()
        for thread in heartbeat.threads:
            thread.join(1)  # not for a thread that waits for a lost store


class _Heartbeat:
    """Beats of all processes, in torchrun's store; a silent process ends the others.

    The store is on the first host, and its calls wait forever when the cable to it is cut: hence a
    thread that talks, and one that counts.
    """

    def __init__(self, store: Any, rank: int, hosts: list[str]) -> None:
        self._store, self._rank, self._hosts = store, rank, hosts
        self._beats: list[bytes] = []
        self._missed = [0] * len(hosts)
        self._files_before = set(_OPEN_FILES.glob("*"))
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._beat, self._watch)]
        for thread in self.threads:
            thread.start()

    def describe_silence(self) -> EngineError | None:
        """Return an error that names the processes that have been silent for some time, if any."""
        silent = [rank for rank, missed in enumerate(self._missed) if missed >= _SUSPECT]
        if not silent:
            return None

        names = ", ".join(f"process {rank} ({self._hosts[rank]})" for rank in silent)
        silent_s = max(self._missed) * _BEAT_S
        return EngineError(
            "silent-process",
            f"{names}: no sign of life for {silent_s:.0f} s",
            remedy="run the same command again, also on fewer machines: it resumes at the first "
            f"missing block. On the first one alone: {shlex.join(sys.orig_argv)}",
        )

    def _beat(self) -> None:
        """Count the own beats and read those of all, until the end or until the store is lost."""
        keys = [f"beat-{rank}" for rank in range(len(self._hosts))]
        with suppress(RuntimeError):
            while True:
                self._store.add(keys[self._rank], 1)  # at once: all others wait for the first one
                self._beats = self._store.multi_get(keys)
                if self.ended.wait(_BEAT_S):
                    return

    def _watch(self) -> None:
        """Count missed beats; not seconds, which also pass while this process is stopped."""
        last = self._beats

        while max(self._missed) < _LIMIT:
            if self.ended.wait(_BEAT_S):
                return

            beats, self._beats = self._beats, []
            if not beats:
                self._missed[0] += 1  # its host has the store
                continue
            for rank, beat in enumerate(beats):
                is_missing = beat in last[rank : rank + 1]
                self._missed[rank] = is_missing * (self._missed[rank] + 1)
            last = beats

        self._stop()

    def _stop(self) -> None:
        """End the main thread with an error, wherever it waits; else end the process."""
        os.kill(os.getpid(), signal.SIGTERM)

        # gloo lets no signal through until its connections end.
        for file in set(_OPEN_FILES.glob("*")) - self._files_before:
            with suppress(OSError):  # no socket, or one that listens
                connection = socket.socket(fileno=os.dup(int(file.name)))
                connection.getpeername()
                connection.shutdown(socket.SHUT_RDWR)

        error = self.describe_silence()
        if error and not self.ended.wait(_GRACE_S):  # one call of torch may take minutes
            sys.stderr.write(f"error: {error.message} [{error.code}]\n  → {error.remedy}\n")
            os._exit(error.exit_code)


def choose_interface(store: Any, rank: int, world_size: int) -> list[str]:
    """Have gloo use the interface that leads to other hosts; return host and address of each rank.

    gloo looks up its own host name, which is 127.0.1.1 on Debian. A user's choice stays.
    """
    own, _ = _find_route(os.environ["MASTER_ADDR"])
    store.set(f"host-{rank}", f"{socket.gethostname()} {own}")
    hosts = [store.get(f"host-{other}").decode() for other in range(world_size)]

    # The host that MASTER_ADDR names may find 127.0.1.1 there; then another one's address helps.
    for host in hosts:
        address = host.split()[-1]
        if not address.startswith("127.") and not os.environ.get(_INTERFACE):
            _, os.environ[_INTERFACE] = _find_route(address)
    return hosts


def _find_route(other: str) -> tuple[str, str]:
    """Return this host's IPv4 address on the way to another one, and its interface.

    Without a route by IPv4, the interface is empty, and gloo chooses.
    """
    own = "127.0.0.1"
    with suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex() if sys.platform == "linux" else ():
            with suppress(OSError):  # it has no address
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(reply[20:24]) == own:
                    return own, name
    return own, ""

"""A reading process's work in this process, where libFuzzer sees it; its limits as far as they go.

What took more than its limits is no finding here: the product ends such a process. Whether it does
is for the whole way to show, which starts one: :func:`reaches_limits`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import signal
from collections.abc import Iterator
from types import FrameType

from racdeploy.processes.memory import resident_bytes
from racdeploy.processes.messages import Header, rebuild_error
from racdeploy.sandbox import worker
from racdeploy.sandbox.client import DEFAULT_MEMORY_BYTES, Sandbox, SandboxRequest

_SECONDS = 0.3  # less than there: a run has no time to lose, and the whole way decides
_MORE_BYTES = 1 << 30  # native code ends the process where it gets no memory
_over = False


class _Overtime(BaseException):
    """An operation takes longer than it may."""


class InProcess(Sandbox):
    """A reader whose process is this one."""

    def __init__(
        self, module: str, memory_bytes: int = DEFAULT_MEMORY_BYTES, *, opens_files: bool = False
    ) -> None:
        super().__init__(module, memory_bytes, opens_files=opens_files)
        self._operations = importlib.import_module(module).OPERATIONS
        self._unsettled: list[SandboxRequest] = []

    def add_setup(self, key: str, request: SandboxRequest) -> None:
        self._unsettled.append(request)

    def remove_setup(self, key: str) -> None:
        pass

    def start(self) -> None:
        pass

    def ask(self, request: SandboxRequest) -> Header:
        while self._unsettled:
            self._carry_out(self._unsettled[0])
            del self._unsettled[0]
        return self._carry_out(request)

    def close(self) -> None:
        pass

    def _carry_out(self, request: SandboxRequest) -> Header:
        sent = {"op": request.op, "seconds": request.seconds, **request.values}
        payload = sent.pop("payload", b"")
        with _within_limits():
            received = {**json.loads(json.dumps(sent)), "payload": payload}
            header = worker._carry_out(self._operations, received)

        payload = header.pop("payload", b"")
        answer = json.loads(json.dumps(header))
        if "failed" in answer:
            raise request.make_error(answer["failed"])
        if "raised" in answer:
            raise rebuild_error(answer)
        return {**answer, "payload": payload}


@contextlib.contextmanager
def reaches_limits() -> Iterator[list[bool]]:
    """Yield a list that holds, behind the body, whether something in it was over its limits."""
    global _over
    _over = False
    found: list[bool] = []
    try:
        yield found
    finally:
        found.append(_over)


@contextlib.contextmanager
def _within_limits() -> Iterator[None]:
    global _over
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    taken = resident_bytes("VmData")
    before = resident_bytes("VmHWM")
    resource.setrlimit(resource.RLIMIT_DATA, (taken + _MORE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        if resident_bytes("VmHWM") - before > DEFAULT_MEMORY_BYTES // 2:
            _over = True


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Raise in the body after so much processor time, as soon as the interpreter is reached."""
    signal.signal(signal.SIGPROF, _end)
    signal.setitimer(signal.ITIMER_PROF, min(seconds, _SECONDS))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _end(number: int, frame: FrameType | None) -> None:
    global _over
    _over = True
    raise _Overtime


worker.processor_time = _processor_time

"""Children of racdeploy that are forked where their module is imported already.

Starting Python and importing torch, onnxruntime or llama.cpp is most of what a child of a small
test takes. ``install`` makes ``subprocess.Popen`` ask a server to fork the children that
:mod:`racdeploy.processes.child_process` starts. Each module has a server, and one serves all that
need torch. The children run the same code with the same arguments, pipes and limits. All other
commands are started as ever, and all children within ``exec_children``.

``python -P -m tests.support.prefork SOCKET MODULE …`` is the server. It answers one request at a
time: to fork, or to tell whether a child has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from tests.support import hold

_RUNNER = [sys.executable, "-P", "-m", "racdeploy.processes.die_with_parent"]
_WITH_ARGUMENT = {"racdeploy.engines.worker": 1, "racdeploy.sandbox.worker": 1}
"""Modules whose next argument is a module that they import."""
_PRELOADED = {
    "racdeploy.__main__": ("racdeploy.pipeline.build", "transformers.models.qwen3.modeling_qwen3"),
    "racdeploy.exporting.onnx.exporters.torch.child": ("transformers.models.auto.modeling_auto",),
    "racdeploy.exporting.onnx.parity": ("transformers.models.qwen3.modeling_qwen3",),
}
"""What these modules import late."""
_TOGETHER = tuple(_PRELOADED)
"""Modules that one server imports: most of what each takes is torch and transformers."""
_READ = ("GGML_", "HF_", "LLAMA_", "OMP_", "RACDEPLOY_")
"""First letters of variables that modules read when they are imported."""
_MAX_BYTES = 1 << 20
_POLL_S = 0.001


class _Server:
    """The process that has imported a module, from which its children are forked."""

    def __init__(self, modules: tuple[str, ...], env: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_BYTES)
        with other:
            command = [sys.executable, "-P", "-m", __name__, str(other.fileno()), *modules]
            self._process = _Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env={**env, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def ask(self, request: Mapping[str, Any], descriptors: list[int] | None = None) -> Any:
        """Return the answer to a request, which may come with open files."""
        message = json.dumps(request).encode()
        with self._lock:
            if descriptors:
                socket.send_fds(self._socket, [message], descriptors)
            else:
                self._socket.send(message)
            return json.loads(self._socket.recv(_MAX_BYTES))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


_Popen = subprocess.Popen
_servers: dict[tuple[str, ...], _Server] = {}
_servers_lock = threading.Lock()
_owner = os.getpid()
_is_off = 0
_children_s = 0.0


def install() -> None:
    """Let this process's children of racdeploy be forked, where files can be sent to a process."""
    if sys.platform == "linux":
        subprocess.Popen = _ForkedPopen  # type: ignore[misc]


@contextlib.contextmanager
def exec_children() -> Iterator[None]:
    """Start all children as ever, for tests of what a new process is."""
    global _is_off
    _is_off += 1
    try:
        yield
    finally:
        _is_off -= 1


def read_children_s() -> float:
    """Return the processor time of the forked children that have ended."""
    return _children_s


class _ForkedPopen(_Popen):  # type: ignore[type-arg, misc]
    """A process whose server forks it, if it is a child of racdeploy."""

    _server: _Server | None = None

    def _execute_child(self, args: Any, *others: Any) -> None:
        executable, preexec, _, pass_fds, cwd, env = others[:6]
        pipes = others[9:15]
        is_plain = executable is None and preexec is None and not pass_fds and cwd is None
        modules = _list_modules(args)
        if not modules or not is_plain or _is_off or os.getpid() != _owner:
            super()._execute_child(args, *others)  # type: ignore[misc]
            return

        stdin, _, _, stdout, _, stderr = pipes
        files = [own if given == -1 else given for own, given in enumerate((stdin, stdout, stderr))]
        variables = dict(os.environ if env is None else env)
        self._server = _find_server(modules, variables)
        request = {"arguments": args[5:], "env": variables, "new_session": others[20]}
        self.pid = self._server.ask(request, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]

        while True:
            status, took_s = self._server.ask({"pid": self.pid})
            if status is not None:
                global _children_s
                _children_s += took_s
                return self.pid, status
            if wait_flags & os.WNOHANG:
                return 0, 0
            time.sleep(_POLL_S)

    def _internal_poll(self, *unused: Any, **also_unused: Any) -> int | None:
        if self._server is None:
            return super()._internal_poll(*unused, **also_unused)  # type: ignore[misc, no-any-return]

        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _list_modules(args: Any) -> tuple[str, ...]:
    """Return the modules of a child's server, or nothing if it is no child of racdeploy."""
    if not isinstance(args, list) or args[:4] != _RUNNER:
        return ()

    module = args[7]
    if not module.startswith(("racdeploy.", "onnxruntime_genai.")):
        return ()
    if module in _TOGETHER:
        return _TOGETHER
    return (module, *args[8 : 8 + _WITH_ARGUMENT.get(module, 0)])


def _find_server(modules: tuple[str, ...], variables: Mapping[str, str]) -> _Server:
    """Return the server for modules that read these variables when they are imported."""
    read = [f"{name}={variables[name]}" for name in sorted(variables) if name.startswith(_READ)]
    key = (*modules, *read)
    with _servers_lock:
        if key not in _servers:
            _servers[key] = _Server(modules, variables)
        return _servers[key]


def _close_servers() -> None:
    if os.getpid() == _owner:
        for server in _servers.values():
            server.close()


atexit.register(_close_servers)


def main() -> None:
    """Import the modules, then fork until the socket is closed; a child runs its command."""
    descriptor, *modules = sys.argv[1:]
    gc.disable()  # what is imported stays
    for module in modules:
        for name in (module, *_PRELOADED.get(module, ())):
            importlib.import_module(name)
    gc.enable()
    gc.freeze()

    with socket.socket(fileno=int(descriptor)) as connection:
        arguments = _serve(connection)
    if arguments is not None:
        del sys.modules[arguments[2]]  # its code is run once more, as the main module
        # Not by sys.exit: onnxruntime would wait for a thread that its import has started, and
        # that no fork has.
        os._exit(_run([str(os.getppid()), *arguments]))


def _run(arguments: list[str]) -> int:
    """Run a child's command; return its exit code."""
    sys.argv = [_RUNNER[-1], *arguments]
    try:
        runpy.run_module(_RUNNER[-1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _serve(connection: socket.socket) -> list[str] | None:
    """Answer requests; return a child's arguments in the child, and None at the end."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, _MAX_BYTES, 3)
        if not message:
            return None

        request = json.loads(message)
        if "pid" in request:
            answer: Any = _look_after(request["pid"])
        elif answer := _fork(request, files):
            for file in files:
                os.close(file)
        else:
            return list(request["arguments"])
        connection.send(json.dumps(answer).encode())


def _fork(request: Mapping[str, Any], files: list[int]) -> int:
    """Return a child's process number, or 0 in the child, which is then what was asked for.

    The server waits for that, as who starts a process waits for its session.
    """
    waiting, becoming = os.pipe()
    if pid := os.fork():
        os.close(becoming)
        os.read(waiting, 1)
        os.close(waiting)
        return pid

    os.close(waiting)
    _become_child(request, files)
    os.close(becoming)
    return 0


def _look_after(pid: int) -> tuple[int | None, float]:
    """Return a child's status, None while it runs, and its processor time."""
    ended, status, usage = os.wait4(pid, os.WNOHANG)
    return (status, usage.ru_utime + usage.ru_stime) if ended else (None, 0.0)


def _become_child(request: Mapping[str, Any], files: list[int]) -> None:
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    if request["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in given if path not in sys.path]
    hold.install()


if __name__ == "__main__":
    main()

"""Forks, killed parents and stopped children: never another's answer, never a wait without end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from racdeploy.engines import engine_process as children
from racdeploy.engines.backends.llamacpp import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.processes.child_process import environment
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_bundle
from tests.support.waiting import PATIENCE_S, wait_for, wait_for_end

pytestmark = [
    pytest.mark.answers("H2", "L3"),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork"),
]
in_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
LONG = Sampling(max_new_tokens=200, stop_ids=())
SETTINGS = EngineSettings(context_tokens=256, parallel=1, threads=1)

# What a fork tries with its parent's model: each attempt must be refused at once.
ASKED_BY_A_FORK = """
import asyncio, os, sys, threading, warnings
import racdeploy
from racdeploy.errors import ForkedError
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of every such fork

model = racdeploy.load(sys.argv[1], threads=1)
expected = model.generate("What is 12 times 34?")
assert "".join(text for text, kind in model.stream("hello")) is not None

def attempts():
    yield lambda: model.generate("mine")
    yield lambda: model.generate_many(["mine", "yours"])
    yield lambda: model.continue_text("mine")
    yield lambda: list(model.stream("mine"))
    yield lambda: asyncio.run(model.agenerate("mine"))
    yield lambda: model.engine.tokenize("mine")
    yield lambda: model.engine.logits([1, 2])

answers = []
busy = threading.Thread(target=lambda: answers.append(model.generate("What is 12 times 34?")))
busy.start()

forks = []
for _ in range(2):
    fork = os.fork()
    if not fork:
        refused = 0
        for attempt in attempts():
            try:
                attempt()
            except ForkedError as error:
                refused += "gunicorn without --preload" in str(error)
        refused += not model.engine.is_alive()
        model.close()
        with racdeploy.load(sys.argv[1], threads=1) as own:
            refused += own.generate("What is 12 times 34?") == expected
        os._exit(refused)
    forks.append(fork)

busy.join()
assert answers == [expected]
print([os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks], flush=True)
assert model.generate("What is 12 times 34?") == expected
model.close()
print("closed", flush=True)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def _run(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        env=environment() | variables,
        text=True,
    )


@pytest.mark.takes(4, "three models in three processes")
def test_a_fork_is_refused_and_loads_its_own(bundle: Path) -> None:
    """As workers of a server that loaded the model first, while the parent's own thread asks."""
    with _run(ASKED_BY_A_FORK, bundle) as parent:
        said, _ = parent.communicate(timeout=PATIENCE_S)
    assert said.splitlines() == ["[9, 9]", "closed"]
    assert parent.returncode == 0


def test_a_fork_that_ends_like_a_program_leaves_the_model_alone(bundle: Path) -> None:
    """Its atexit functions and its garbage neither wait nor end the parent's engine."""
    code = """
import os, sys, racdeploy
model = racdeploy.load(sys.argv[1], threads=1)
expected = model.generate("hi")
fork = os.fork()
if not fork:
    del model
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
print(model.generate("hi") == expected)
"""
    with _run(code, bundle) as parent:
        said, _ = parent.communicate(timeout=PATIENCE_S)
    assert said.splitlines() == ["7", "True"]


def test_a_model_outlives_the_thread_that_loaded_it(bundle: Path) -> None:
    """Linux would end the engine with that thread, had it started it."""
    code = """
import os, sys, threading, racdeploy
models = []
thread = threading.Thread(target=lambda: models.append(racdeploy.load(sys.argv[1], threads=1)))
thread.start()
thread.join()
while os.path.exists(f"/proc/self/task/{thread.native_id}"):
    pass  # Python joins a thread before it is gone
print(models[0].generate("hi").finish_reason)
"""
    with _run(code, bundle) as parent:
        said, _ = parent.communicate(timeout=PATIENCE_S)
    assert said.strip() in ("stop", "length")


def _find(mark: str) -> list[int]:
    """Return the processes whose environment has a word."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in (place / "environ").read_bytes() and state not in "ZX":
                found.append(int(place.name))
        except OSError:
            continue
    return found


@in_proc
def test_a_killed_parent_leaves_no_child_though_its_fork_lives(bundle: Path) -> None:
    """In the middle of an answer; the fork holds the pipes."""
    code = """
import os, signal, sys, racdeploy
model = racdeploy.load(sys.argv[1], threads=1)
fork = os.fork()
if not fork:
    signal.pause()
    os._exit(0)
print(fork, model.engine.pid, flush=True)
stream = model.stream("hi")
next(stream)
print("asking", flush=True)
for _ in stream:
    pass
while True:
    model.generate_many(["hi"] * 100)
"""
    mark = uuid.uuid4().hex
    with _run(code, bundle, RACDEPLOY_MARK=mark) as parent:
        assert parent.stdout is not None
        fork, child = map(int, parent.stdout.readline().split())
        assert child in _find(mark)
        assert parent.stdout.readline() == "asking\n"
        parent.kill()
    try:
        wait_for_end(child)
        assert fork in _find(mark)
    finally:
        os.kill(fork, signal.SIGKILL)


@in_proc
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1, 0.3])
def test_a_parent_killed_while_its_child_starts_leaves_none(bundle: Path, delay_s: float) -> None:
    """Also before the child could ask to be ended: it looks who its parent is."""
    code = """
import os, sys
from racdeploy.processes import child_process
held = os.pipe()  # no pipe's end tells it
child_process.start_module("timeit", "-n1", "-s", "import time", "time.sleep(60)", pass_fds=held)
print("started", flush=True)
sys.stdin.read()
"""
    mark = uuid.uuid4().hex
    with _run(code, RACDEPLOY_MARK=mark) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        time.sleep(delay_s)
        parent.kill()

        # Not collected yet: a dead process that still has its number.
        wait_for(lambda: not _find(mark), "the child to get as far as asking, and to end")


@pytest.fixture
def short_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_STUCK_S", 1.0)
    monkeypatch.setattr(children, "_REPEAT_CANCEL_S", 0.2)


@pytest.mark.usefixtures("short_bound")
def test_a_cancelled_call_of_a_stopped_child_ends_with_an_error(bundle: Path) -> None:
    """Within the bound, and the next call says the same."""
    with open_engine(bundle / "model.gguf", SETTINGS) as engine:
        # Before the call: a child that is stopped later may have answered already.
        os.kill(engine.pid, signal.SIGSTOP)

        with raises("engine-stuck", "1 s"):
            engine.generate([[9, 8]] * 400, LONG, cancelled=lambda: True)
        with raises("engine-stuck"):
            engine.tokenize("again")
        assert not engine.is_alive()


@pytest.mark.usefixtures("short_bound")
def test_a_long_prompt_to_a_stopped_child_ends_with_an_error(bundle: Path) -> None:
    """The pipe is full before all of it is written."""
    settings = EngineSettings(context_tokens=32_000, parallel=1, threads=1)
    with open_engine(bundle / "model.gguf", settings) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        with raises("engine-stuck"):
            engine.generate([[480] * 30_000] * 20, LONG)


@pytest.mark.usefixtures("short_bound")
def test_a_child_that_was_stopped_for_a_moment_goes_on(bundle: Path) -> None:
    """One that is only slow to end is not killed: it says that it lives."""
    with open_engine(bundle / "model.gguf", SETTINGS) as engine:
        cancelled = threading.Event()

        def stop(index: int, ids: Sequence[int], ended: object) -> None:
            if not cancelled.is_set():
                os.kill(engine.pid, signal.SIGSTOP)
                cancelled.set()
                threading.Timer(0.5, os.kill, (engine.pid, signal.SIGCONT)).start()

        found = engine.generate([[9, 8]] * 400, LONG, on_tokens=stop, cancelled=cancelled.is_set)
        assert {completion.finish_reason for completion in found} <= {"cancelled", "length"}
        assert engine.generate([[9, 8]], Sampling(3, ()))[0].finish_reason == "length"


def test_generate_inside_on_text_gets_its_own_answer(bundle: Path) -> None:
    """Both are what they would be alone."""
    import racdeploy

    with racdeploy.load(bundle, threads=1) as model:
        inner, outer = model.generate("inner"), model.generate("outer")
        found = []

        def ask(text: str, kind: str) -> None:
            if not found:
                found.append(model.generate("inner"))

        assert outer == model.generate("outer", on_text=ask)
        assert found == [inner]

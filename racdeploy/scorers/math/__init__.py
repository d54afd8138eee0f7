r"""Mathematical equality by Hugging Face's Math-Verify: \frac{1}{2} is 0.5, {1, 2} is {2, 1}.

Math-Verify bounds its time with a signal, which needs the main thread, and its parser can hang all
the same. It therefore runs in a child process; where that is ended, the answer counts as wrong.
Source: math-verify 0.8.
"""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
import threading

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.plugins import require
from racdeploy.scorers import Scored
from racdeploy.storage import child

SECONDS = 10.0
START_SECONDS = 60.0
_WORKER = "racdeploy.scorers.math.worker"


def check(argument: str) -> None:
    """Refuse an argument, and a machine without Math-Verify."""
    if argument:
        raise UsageError("scorer 'math' takes no argument", remedy="write math")
    require("math_verify")


def score(answer: str, gold: str, argument: str) -> Scored:
    """Let the child compare both."""
    return _worker.ask(answer, gold)


class Worker:
    """The child process; made with the first question, and again after one that ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, answer: str, gold: str, seconds: float = SECONDS) -> Scored:
        """Return the child's verdict, or "wrong" with the reason why there is none."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None

            try:
                process.stdin.write(json.dumps([answer, gold]) + "\n")
                process.stdin.flush()
                line = self._answers.get(timeout=seconds)
            except (queue.Empty, BrokenPipeError):
                self.close()
                return Scored(False, None, f"math-verify gave no answer within {seconds:g} s")

        if not line:
            self.close()
            return Scored(False, None, "math-verify died of this answer")

        correct, extracted, how = json.loads(line)
        return Scored(correct, extracted, how)

    def close(self) -> None:
        """End the child; again is harmless."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        """Start the child and wait until it has imported what it needs."""
        check("")
        process = child.start_module(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=child.environment(),
            start_new_session=True,
        )

        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(process, answers), daemon=True).start()
        self._process, self._answers = process, answers

        try:
            ready = answers.get(timeout=START_SECONDS)
        except queue.Empty:
            ready = ""

        if ready != "ready\n":
            self.close()
            raise EnvironmentFailure(
                "math-verify does not start",
                remedy=f"see what it says: {sys.executable} -m {_WORKER}",
            )

        return process


def _listen(process: subprocess.Popen[str], answers: queue.SimpleQueue[str]) -> None:
    """Move lines from the pipe to the queue; an empty one marks the end."""
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


_worker = Worker()
atexit.register(_worker.close)

"""Thoughts of 16,000 tokens, as reasoning models have them: figures, loops, memory, a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import environment
from tests.support.hold import held_at_answers
from tests.support.long_thoughts import PROMPTS
from tests.support.waiting import wait_for_stop

pytestmark = pytest.mark.more

TOKENS = 16_000


def _command(work: Path, tokens: int) -> list[str]:
    return [sys.executable, "-m", "tests.support.long_thoughts", str(work), str(tokens)]


def _compare(work: Path, tokens: int) -> dict[str, Any]:
    ran = subprocess.run(
        _command(work, tokens), env=environment(), capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_long_thoughts_are_compared_and_resumed(tmp_path: Path) -> None:
    """Killed on the way, the run keeps what had ended. Every length and loop is found; page and
    memory grow by less than what the tokens themselves take.
    """
    process = subprocess.Popen(
        _command(tmp_path / "long", TOKENS),
        env=environment(**held_at_answers(2)),
        stdout=subprocess.DEVNULL,
    )
    wait_for_stop(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    found = _compare(tmp_path / "long", TOKENS)
    assert found["generated"] <= 2 * PROMPTS - 2
    assert found["lengths"][:PROMPTS] == [TOKENS] * PROMPTS
    assert found["correct"] == [True] * PROMPTS + [False] * PROMPTS
    assert found["verdict"] == "fail"
    assert found["figures"]["loops_pruned"] == found["figures"]["unclosed_pruned"] == PROMPTS

    # An id takes 36 bytes as a Python integer in a tuple; it is kept as id, text and record.
    short = _compare(tmp_path / "short", TOKENS // 4)
    more = 2 * PROMPTS * TOKENS * 3 // 4
    assert found["peak_bytes"] - short["peak_bytes"] < 200 * more
    assert found["page_bytes"] < 1_000_000

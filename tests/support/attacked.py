"""A process that opens what is hostile, one case a line of stdin, and says what each one took.

A case is ``[kind, arguments]``: ``["template", [SOURCE]]``, ``["tokenizer", [FOLDER]]``,
``["scorer", [SPEC, ANSWER, GOLD]]`` or ``["license", [FOLDER]]``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.errors import RacdeployError
from racdeploy.models.model_card import read_license
from racdeploy.processes.memory import resident_bytes
from racdeploy.runtime.template import ChatTemplate, PromptEncoder
from racdeploy.sandbox.client import Sandbox
from racdeploy.tasks import scoring

TEXT = "There were eleven elephants; we let them sleep. " * 4


@dataclass(frozen=True)
class Outcome:
    """What a case ended with: exit code (0 without an error), message, and what it took.

    Args:
        memory_bytes: peak of the largest process so far, of all cases before it, too.
    """

    code: int
    message: str
    processor_s: float
    memory_bytes: int


def attack(cases: Iterable[tuple[str, list[str]]]) -> list[Outcome]:
    """Carry out cases in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.attacked"],
        input="\n".join(map(json.dumps, cases)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]


def _template(source: str) -> str:
    reader = Sandbox("racdeploy.sandbox.text_operations")
    try:
        return ChatTemplate(source, sandbox=reader).render([{"role": "user", "content": TEXT}])
    finally:
        reader.close()


def _tokenizer(folder: str) -> str:
    encoder = PromptEncoder.start_loading(Path(folder))
    try:
        encoder.check()
        return encoder.decode([*encoder.encode(TEXT), *range(200)])
    finally:
        encoder.tokenizer.sandbox.close()


def _scorer(spec: str, answer: str, gold: str) -> str:
    scoring.check(spec)
    return str(scoring.score(spec, answer, gold))


def _license(folder: str) -> str:
    return read_license(Path(folder))


_KINDS: dict[str, Callable[..., str]] = {
    "template": _template,
    "tokenizer": _tokenizer,
    "scorer": _scorer,
    "license": _license,
}


def _carry_out(kind: str, arguments: list[str]) -> list[Any]:
    before_s = _processor_s()
    try:
        code, message = 0, _KINDS[kind](*arguments)
    except RacdeployError as error:
        code, message = error.exit_code, error.message
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the test looks for
        code, message = 1, f"not one of ours: {error!r}"

    return [code, message[:4000], _processor_s() - before_s, _peak_bytes()]


def _processor_s() -> float:
    own, children = _usages()
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_bytes() -> int:
    # Of this process, getrusage counts what its parent had before exec, too.
    _, children = _usages()
    return max(resident_bytes("VmHWM"), children.ru_maxrss * 1024)


def _usages() -> list[resource.struct_rusage]:
    return [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]


def main() -> None:
    """Answer each line."""
    for line in sys.stdin:
        print(json.dumps(_carry_out(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

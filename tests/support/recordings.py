"""Sessions at a shell as a user sees them, at 80 columns, as pictures of the guides.

    python -m tests.support.recordings BUNDLE [NAME ...]

Types the lines of each session, or of those that are named, into shells that find ``bundle`` and
``examples`` in their folder, and writes docs/pictures/NAME.svg. A session with several shells is
drawn one below the other. The Hub is a stand-in, which goes by the Hub's name in the pictures.
Ports 8000 and 8080 have to be free. ``harness`` runs lm-eval: RACDEPLOY_HARNESS_PYTHON names the
Python of an environment that has it, and the bundle's work folder has to be the default one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from tests.support.drawing import draw, read_screen
from tests.support.hub_server import Hub, hub_server
from tests.support.terminal import CTRL_C, Terminal

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS = 80
_PROMPT = "$ "
_PATIENCE_S = 600.0  # two models asked by a harness, on a machine under load
_SHELL = ("bash", "--noprofile", "--norc", "--noediting")


@dataclass(frozen=True)
class Step:
    """A line that is typed, and what is shown when it is time for the next one."""

    typed: str
    then: str = f"\n{_PROMPT}"


@dataclass(frozen=True)
class Session:
    """Steps of one shell after the other; all but the last one still run what they started.

    Args:
        files: what lies in the folder beside the bundle, by name; HERE in them is that folder.
        shown: how many lines of the beginning and of the end are drawn; 0 draws all.
        table: title of a table between them that is drawn, too.
    """

    shells: tuple[tuple[Step, ...], ...]
    files: Mapping[str, str] = field(default_factory=dict)
    shown: tuple[int, int] = (0, 0)
    table: str = ""


_CLIENT = """\
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
asked = [{"role": "user", "content": "What is 12 times 34?"}]

heading = ""
answer = client.chat.completions.create(model="", messages=asked, stream=True)
for chunk in answer:
    delta = chunk.choices[0].delta
    for name in ("reasoning_content", "content"):
        if text := getattr(delta, name, None):
            if heading != name:
                heading = name
                print(f"\\n[{name}]")
            print(text, end="", flush=True)
print()
"""
_MANY = """\
import asyncio, httpx

async def ask(app, number):
    asked = {"question": f"What is {number} times 34?"}
    found = (await app.post("/ask", json=asked)).json()
    print(found["answer"], found["thinking_tokens"], "tokens of thinking")

async def main():
    async with httpx.AsyncClient(base_url="http://127.0.0.1:8000") as app:
        await asyncio.gather(*(ask(app, number) for number in range(11, 19)))

asyncio.run(main())
"""
_QUESTION = (
    "Ann has 45 apples. Ann buys 38 more. Ann gives away 26. Ann finds 12 more. "
    "How many apples does Ann have now?"
)
_TASK = """\
task: apples
dataset_path: json
dataset_kwargs: {data_files: {test: HERE/apples/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"]}
filter_list:
  - name: last-number
    filter:
      - {function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def _ask_for_apples() -> str:
    """Return 60 questions with their answers, a JSON object a line."""
    lines = []
    for first in range(40, 100):
        question = _QUESTION.replace("45", str(first))
        lines.append(json.dumps({"question": question, "answer": str(first + 38 - 26 + 12)}))
    return "\n".join(lines)


_ANSWERED, _READY = " tokens/s\r\n", "> "

SESSIONS = {
    "chat": Session(
        (
            (
                Step("racdeploy chat bundle", "Ctrl-D leaves.\r\n"),
                Step("What is 12 times 34?", _ANSWERED),
                Step("/reset", "is the first\r\n"),
                Step("/think 256", "256 tokens\r\n"),
                Step(_QUESTION, _ANSWERED),
                Step("/thoughts", _READY),
                Step("/bye"),
            ),
        )
    ),
    "serve": Session(
        (
            (Step("racdeploy serve bundle", "}'\r\n"),),
            (
                Step("cat client.py  # in another terminal"),
                Step("python client.py"),
            ),
        ),
        {"client.py": _CLIENT},
    ),
    "push": Session(
        ((Step("racdeploy push bundle acme/tiny-reasoner-GGUF --dry-run"),),), shown=(24, 3)
    ),
    "fastapi": Session(
        (
            (
                Step(
                    "BUNDLE=bundle uvicorn --app-dir examples/fastapi app:app",
                    "(Press CTRL+C to quit)\r\n",
                ),
            ),
            (Step("cat many.py  # in another terminal"), Step("python many.py")),
        ),
        {"many.py": _MANY},
    ),
    "harness": Session(
        (
            (
                Step("ls apples"),
                Step(
                    "racdeploy verify bundle --harness lm-eval --harness-tasks apples "
                    "--harness-include apples --harness-python harness-venv/bin/python"
                ),
            ),
        ),
        {"apples/apples.yaml": _TASK, "apples/questions.jsonl": _ask_for_apples()},
        shown=(12, 5),
        table="Evaluation harness",
    ),
}


def main() -> None:
    """Record, and write the pictures."""
    bundle, *names = sys.argv[1:]
    for name in names or SESSIONS:
        lines = record(SESSIONS[name], Path(bundle))
        (PICTURES / f"{name}.svg").write_text(draw(lines, COLUMNS, name), encoding="utf-8")


def record(session: Session, bundle: Path) -> list[Text]:
    """Return what the shells of a session show, with a blank line between two of them."""
    lines: list[Text] = []

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        hub = stack.enter_context(hub_server())
        (folder / "bundle").symlink_to(bundle.resolve())
        (folder / "examples").symlink_to(ROOT / "examples")
        if harness := os.environ.get("RACDEPLOY_HARNESS_PYTHON"):
            (folder / "harness-venv").symlink_to(Path(harness).parents[1])

        for name, text in session.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text.replace("HERE", str(folder)), encoding="utf-8")

        shells = [stack.enter_context(_open_shell(folder, hub)) for _ in session.shells]
        for shell, steps in zip(shells, session.shells, strict=True):
            _type(shell, steps)
        for shell in shells[:-1]:
            shell.type(CTRL_C)
            shell.wait_for(_PROMPT)

        for shell in shells:
            lines += [*([Text()] if lines else []), *_read(shell, hub)]

    return _leave_out(lines, session) if any(session.shown) else lines


def _leave_out(lines: list[Text], session: Session) -> list[Text]:
    first, last = session.shown
    parts = [lines[:first], lines[-last:]]

    if session.table:
        start = next(place for place, line in enumerate(lines) if session.table in line.plain)
        size = next(size for size, line in enumerate(lines[start:]) if line.plain.startswith("└"))
        parts.insert(1, lines[start : start + size + 1])

    drawn = list(parts[0])
    for part in parts[1:]:
        drawn += [Text("⋮"), *part]
    return drawn


def _open_shell(folder: Path, hub: Hub) -> Terminal:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = Terminal(
        _SHELL,
        columns=COLUMNS,
        folder=folder,
        PATH=programs,
        PS1=_PROMPT,
        TERM="xterm-256color",
        COLORTERM="truecolor",
        HF_ENDPOINT=hub.address,
        HF_HUB_DISABLE_XET="1",
        HF_HUB_OFFLINE="0",
    )
    shell.wait_for(_PROMPT)
    return shell


def _type(shell: Terminal, steps: Sequence[Step]) -> None:
    for step in steps:
        shell.type(f"{step.typed}\r")
        shell.wait_for(step.then, _PATIENCE_S)


def _read(shell: Terminal, hub: Hub) -> list[Text]:
    """Return the lines of a shell without the last, empty prompt and what stopped it."""
    recorded = "".join(text for _, text in shell.recorded)
    said = recorded.partition("^C")[0].replace(hub.address, "https://huggingface.co")
    lines = read_screen(said, COLUMNS)

    while lines and lines[-1].plain in ("", _PROMPT.strip()):
        lines.pop()
    return lines


if __name__ == "__main__":
    main()

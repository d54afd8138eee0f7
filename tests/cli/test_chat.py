"""``run`` and ``chat`` as they are used: in a terminal, interrupted, and with pipes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from racdeploy.cli.chat import Chat
from racdeploy.cli.stream import AnswerStream
from racdeploy.files.unprintable import drop_unprintable
from racdeploy.runtime import Conversation, GenerationResult, Model, load
from racdeploy.runtime.conversation import Turn
from tests.support.commands import Outcome, command, environment, racdeploy
from tests.support.errors import raises
from tests.support.terminal import CTRL_C, CTRL_D, Terminal
from tests.support.tiny_artifacts import make_bundle
from tests.support.tiny_models import edit_json

_LONG = 20_000
"""Tokens that take longer than anybody here waits: the random model never stops by itself."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model within its small limits."""
    return make_bundle(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model, which thinks until it is interrupted."""
    made = make_bundle(tmp_path_factory.mktemp("endless"))
    limits = {"max_new_tokens": _LONG, "max_thinking_tokens": None, "context_tokens": _LONG + 500}
    own = json.loads((made / "racdeploy.json").read_text())["generation"]
    edit_json(made / "racdeploy.json", generation=own | limits)
    return made


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1) as loaded:
        yield loaded


def _piped(text: bytes, *arguments: object) -> Outcome:
    done = subprocess.run(
        command(*arguments), input=text, capture_output=True, env=environment(), timeout=300
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_run_prints_what_json_says(bundle: Path) -> None:
    """Streamed and stripped, from an argument or stdin; the thinking goes to stderr."""
    whole = json.loads(racdeploy("run", bundle, "What is 2+2?", "--json").out)
    assert whole["thinking"]
    assert whole["answer"]

    given = racdeploy("run", bundle, "What is 2+2?", "--show-thinking")
    assert (given.code, given.out) == (0, whole["answer"] + "\n")
    assert drop_unprintable(whole["thinking"][:8]).strip() in given.err
    assert given.err == drop_unprintable(given.err)
    for arguments in ([], ["-"]):
        piped = _piped(b"What is 2+2?\n", "run", bundle, *arguments)
        assert (piped.code, piped.out) == (0, given.out)
        assert "thinking" not in piped.err, "lines that vanish are for terminals"


@pytest.mark.parametrize(
    ("text", "arguments", "code"),
    [
        (b"", ["", "--json"], "no-question"),
        (b" \n", [], "no-question"),
        (b"caf\xe9", ["-"], "text-not-utf8"),
    ],
)
def test_run_refuses_what_is_no_question(
    bundle: Path, text: bytes, arguments: list[str], code: str
) -> None:
    outcome = _piped(text, "run", bundle, *arguments)
    assert (outcome.code, outcome.error_code) == (2, code)


def test_run_in_a_terminal_asks_for_a_question(bundle: Path) -> None:
    """It does not wait for a stdin that nobody knows of."""
    with Terminal(command("run", bundle)) as terminal:
        terminal.wait_for("[no-question]")
        assert terminal.wait() == 2


def test_ctrl_c_stops_run_and_keeps_what_was_said(endless: Path) -> None:
    """While it thinks, one line counts; an interrupted answer is on the screen; exit code 130."""
    with Terminal(command("run", endless, "Count.")) as terminal:
        terminal.wait_for("thinking … 1")
        terminal.wait_for("tokens")
        terminal.type(CTRL_C)
        terminal.wait_for("stopped before there was an answer")
        assert terminal.wait() == 130

    with Terminal(command("run", endless, "Count.", "--max-thinking-tokens", 1)) as terminal:
        terminal.wait_for("loading")
        terminal.wait_for_characters(500)
        terminal.type(CTRL_C)
        terminal.wait_for("stopped\r\n")
        assert terminal.wait() == 130


def test_a_chat_in_a_terminal(endless: Path, tmp_path: Path) -> None:
    """Types, interrupts a thought and an answer, goes on, looks back, and leaves."""
    saved = tmp_path / "talk.json"

    with Terminal(command("chat", endless, "--threads", 1)) as terminal:
        terminal.wait_for("/help lists commands")
        terminal.wait_for("> ")
        terminal.type("Count.\r")
        terminal.wait_for("thinking … 1")
        terminal.type(CTRL_C)
        terminal.wait_for("stopped before there was an answer")
        terminal.wait_for("/thoughts shows them), ")
        terminal.wait_for("> ")

        terminal.type("/think 3\r")
        terminal.wait_for("a budget of 3 tokens")
        terminal.wait_for("> ")
        terminal.type("\x1b[A\x1b[A\r")  # two up: the question again
        terminal.wait_for("reading …")
        terminal.wait_for_characters(500)
        terminal.type(CTRL_C)
        terminal.wait_for("thought for 3 tokens")
        terminal.wait_for("> ")

        terminal.type("/nope\r")
        terminal.wait_for("there are: /think, /thoughts")
        terminal.wait_for("> ")
        terminal.type(f"/save {saved}\r")
        terminal.wait_for("saved in")
        terminal.press_at("> ", CTRL_C)
        terminal.wait_for("Ctrl-C again leaves")
        terminal.press_at("> ", CTRL_D)
        assert terminal.wait() == 0

    first, second = json.loads(saved.read_text())["turns"]
    assert first["question"] == second["question"] == "Count."
    assert (first["result"]["finish_reason"], first["result"]["state"]) == ("cancelled", "open")
    assert second["result"]["finish_reason"] == "cancelled"
    assert second["result"]["thinking_tokens"] == 3


def test_a_question_may_have_several_lines(bundle: Path, tmp_path: Path) -> None:
    """Between three quotes, as elsewhere."""
    saved = tmp_path / "talk.json"
    with Terminal(command("chat", bundle, "--context-tokens", 100)) as terminal:
        terminal.wait_for("100 tokens of context")
        terminal.wait_for("> ")
        terminal.type('"""What is\r')
        terminal.wait_for(". ")
        terminal.type('2+2?"""\r')
        terminal.wait_for("tokens/s")
        terminal.wait_for("> ")
        terminal.type(f"/save {saved}\r")
        terminal.wait_for("saved in")
        terminal.press_at("> ", CTRL_D)
        assert terminal.wait() == 0
    (turn,) = json.loads(saved.read_text())["turns"]
    assert turn["question"] == "What is\n2+2?"


def test_run_takes_the_knobs_of_the_library(bundle: Path) -> None:
    """A context of its own, a system message, a limit and a sampling."""
    options = ["--context-tokens", 100, "--system", "Be brief.", "--max-new-tokens", 3]
    outcome = racdeploy("run", bundle, "What?", *options, "--top-p", 0.5, "--json")
    result = json.loads(outcome.out)
    assert result["completion_tokens"] <= 3
    assert (
        result["prompt_tokens"]
        > json.loads(racdeploy("run", bundle, "What?", "--json").out)["prompt_tokens"]
    )

    refused = racdeploy("run", bundle, "x " * 300, "--context-tokens", 100)
    assert (refused.code, refused.error_code) == (2, "prompt-too-long")
    assert "--context-tokens" in refused.err or "the model supports" in refused.err


def test_ctrl_c_twice_leaves_a_chat(bundle: Path) -> None:
    with Terminal(command("chat", bundle)) as terminal:
        terminal.press_at("> ", CTRL_C)
        terminal.wait_for("Ctrl-C again leaves")
        terminal.press_at("> ", CTRL_C)
        assert terminal.wait() == 0


def test_a_piped_chat_answers_each_line_alone(bundle: Path, tmp_path: Path) -> None:
    """As ``run`` does; commands have no line."""
    saved = tmp_path / "talk.json"
    lines = ["What is 2+2?", "", "Why?", f"/save {saved}", "What is 2+2?", "/bye", "x"]
    outcome = _piped("\n".join(lines).encode(), "chat", bundle)

    assert outcome.code == 0, outcome.err
    alone = racdeploy("run", bundle, "What is 2+2?").out
    (turn,) = json.loads(saved.read_text())["turns"]
    assert turn["question"] == "Why?"
    assert outcome.out == f"{alone}\n{turn['result']['answer']}\n{alone}"


def test_a_piped_answer_is_one_line(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also that of a thought that did not end, which is empty."""
    answers = iter(["12\n+ 3\u2028= 15\x1b[2J", ""])

    def ask(self: Conversation, question: str, **_: object) -> GenerationResult:
        answer = next(answers)
        result = GenerationResult(answer, "", 3, 4, "length", "open")
        self.turns.append(Turn(question, result))
        return result

    monkeypatch.setattr(Conversation, "ask", ask)
    chat = Chat(Conversation(model))
    chat.handle_alone("a\n")
    chat.handle_alone("b\n")
    assert capsys.readouterr().out == "12 + 3 = 15[2J\n\n"


def test_a_piped_chat_ends_at_the_first_mistake(bundle: Path) -> None:
    """A script notices."""
    outcome = _piped(b"/thinks\nWhat is 2+2?\n", "chat", bundle)
    assert (outcome.code, outcome.out) == (2, "")
    said = "there is no command /thinks [unknown-chat-command]"
    assert f"error: {said}\n  \u2192 there are: /think, /thoughts" in outcome.err


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("/think many", raises("not-a-token-count", "many")),
        ("/save", raises("no-file-named", "/save")),
        ("/load", raises("no-file-named", "/load")),
        ("/load missing.json", pytest.raises(FileNotFoundError)),
        ("x y " * 400, raises("prompt-too-long")),
    ],
)
def test_a_line_that_cannot_be_carried_out(
    model: Model, line: str, refused: AbstractContextManager[object]
) -> None:
    """It changes nothing."""
    talk = Chat(Conversation(model), max_thinking_tokens=5)
    with refused:
        talk.handle(line)
    assert (talk.max_thinking_tokens, talk.conversation.turns) == (5, [])


def test_settings_of_a_chat(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """The budget holds for what follows; without one of its own, the bundle's does."""
    talk = Chat(Conversation(model))
    for line, expected in (("/think 3", 3), ("/think", 3), ("/think off", 8)):
        talk.handle(line)
        assert f"a budget of {expected} tokens" in capsys.readouterr().err
        talk.handle("Count.")
        assert talk.conversation.turns[-1].result.thinking_tokens == expected

    talk.handle("/thoughts")
    assert talk.conversation.turns[-1].result.thinking[:3] in capsys.readouterr().out


def test_what_would_command_a_terminal_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape sequences in an answer are shown without their escape; in a pipe it is as it came."""
    for is_terminal, expected in ((True, "a[2Jb\tc\n"), (False, "a\x1b[2Jb\tc\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        stream = AnswerStream()
        for piece in ("\n ", "a\x1b[2", "Jb\t", "c", "\n\n"):
            stream.write(piece, "answer")
        stream.finish()
        assert capsys.readouterr().out == expected

"""What of a stream a client sees."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from racdeploy.runtime import AsyncTextStream, TextChunk
from racdeploy.runtime.streams import DaemonThreadPool
from racdeploy.runtime.text import OnText
from racdeploy.serve.text import VisibleText

POOL = DaemonThreadPool(4)


def show(
    pieces: Sequence[tuple[str, str]],
    stops: Sequence[str] = (),
    *,
    strip: bool = True,
    tools: Sequence[str] = (),
) -> tuple[list[TextChunk], VisibleText]:
    """Return what is shown of some pieces."""

    def work(on_text: OnText, cancel: threading.Event) -> None:
        for text, kind in pieces:
            on_text(text, kind)  # type: ignore[arg-type]

    async def read() -> tuple[list[TextChunk], VisibleText]:
        shown = VisibleText(AsyncTextStream(POOL, work), stops, strip=strip, tools=tools)
        return [piece async for piece in shown.pieces()], shown

    return asyncio.run(read())


def joined(pieces: Sequence[tuple[str, str]], kind: str) -> str:
    return "".join(text for text, of in pieces if of == kind)


def test_white_space_round_a_part_is_left_out() -> None:
    pieces = [("\n", "thinking"), ("2+2", "thinking"), (" = 4\n", "thinking")]
    shown, _ = show([*pieces, ("\n\n", "answer"), (" It is", "answer"), (" 4. \n", "answer")])
    assert joined(shown, "thinking") == "2+2 = 4"
    assert joined(shown, "answer") == "It is 4."
    assert all(piece.text for piece in shown)


def test_nothing_is_left_out_of_a_plain_text() -> None:
    shown, _ = show([("\n a", "answer"), (" \n", "answer")], strip=False)
    assert joined(shown, "answer") == "\n a \n"


def test_a_stop_string_over_pieces_ends_the_answer() -> None:
    """Its beginning is held back until it is known; one in the thinking does not count."""
    pieces = [
        ("one END two", "thinking"),
        ("three E", "answer"),
        ("N", "answer"),
        ("D 4", "answer"),
    ]
    shown, reader = show(pieces, ["END"])
    assert (joined(shown, "thinking"), joined(shown, "answer")) == ("one END two", "three")
    assert reader.is_stopped
    assert reader.texts == {"thinking": "one END two", "answer": "three"}

    shown, _ = show([("aa", "answer"), ("b c", "answer")], ["aab"])
    assert joined(shown, "answer") == "", "its longest beginning counts"

    shown, reader = show([("three E", "answer"), ("N", "answer")], ["END"])
    assert joined(shown, "answer") == "three EN"
    assert not reader.is_stopped


@given(
    thinking=st.lists(st.text(" \nab", max_size=4), max_size=5),
    answer=st.lists(st.text(" ab", max_size=3), max_size=8),
    stops=st.lists(st.sampled_from(["ab", "aab", " b", "b a", "aba"]), max_size=2),
    strip=st.booleans(),
)
def test_pieces_are_the_whole(
    thinking: list[str], answer: list[str], stops: list[str], strip: bool
) -> None:
    """However a text is cut into pieces, what is shown of them is what is shown of it."""
    pieces = [(text, "thinking") for text in thinking] + [(text, "answer") for text in answer]
    shown, reader = show(pieces, stops, strip=strip)

    whole = "".join(answer)
    cut = whole[: min((whole.find(stop) for stop in stops if stop in whole), default=None)]
    assert joined(shown, "answer") == (cut.strip() if strip else cut)
    assert reader.is_stopped == any(stop in whole for stop in stops)

    thought = "".join(thinking)
    assert joined(shown, "thinking") == (thought.strip() if strip else thought)
    assert reader.texts == {kind: joined(shown, kind) for kind in ("thinking", "answer")}


CALL = '{"name": "add", "arguments": {"a": 1, "b": "</x>"}}'
LLAMA_CALL = '{"type": "function", "name": "add", "parameters": {}}'


@pytest.mark.parametrize(
    ("answer", "text", "arguments"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", [{"a": 1, "b": "</x>"}]),
        (f"I add.\n<tool_call>{CALL}</tool_call>\n", "I add.", [{"a": 1, "b": "</x>"}]),
        (
            f"<tool_call>{CALL}</tool_call>\n<tool_call>{LLAMA_CALL}",
            "",
            [{"a": 1, "b": "</x>"}, {}],
        ),
        (f" {LLAMA_CALL} ", "", [{}]),
        ("It is <tool_box>", "It is <tool_box>", []),
        ("It is <tool", "It is <tool", []),
        (f"Say {CALL}", f"Say {CALL}", []),
        (CALL.replace("add", "sub"), CALL.replace("add", "sub"), []),
        (CALL[:-1], CALL[:-1], []),
        ('{"a": 1}', '{"a": 1}', []),
        ("[1]", "[1]", []),
        ("", "", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_of_tools_are_no_text(
    answer: str, text: str, arguments: list[Any], size: int
) -> None:
    """However they are cut into pieces; what is no whole call of a known tool is text."""
    pieces = [(answer[i : i + size], "answer") for i in range(0, len(answer), size)]
    shown, reader = show([("<tool_call>", "thinking"), *pieces], tools=["add"])
    assert joined(shown, "thinking") == "<tool_call>"
    assert joined(shown, "answer").strip() == text

    called = [call["function"] for call in reader.calls]
    assert [json.loads(function["arguments"]) for function in called] == arguments
    assert {function["name"] for function in called} <= {"add"}
    assert len({call["id"] for call in reader.calls}) == len(arguments)

    shown, reader = show(pieces)
    assert (joined(shown, "answer"), reader.calls) == (answer.strip(), []), "without tools"


def test_an_error_is_passed_on() -> None:
    def work(on_text: OnText, cancel: threading.Event) -> None:
        on_text("a", "answer")
        raise LookupError("b")

    async def read() -> None:
        async for _ in VisibleText(AsyncTextStream(POOL, work), [], strip=True).pieces():
            pass

    with pytest.raises(LookupError):
        asyncio.run(read())

"""What reads a model's text takes time in proportion to it, whatever a looping model repeats."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence

import pytest

from racdeploy import plugins
from racdeploy.cli import console
from racdeploy.files import unprintable
from racdeploy.report import markdown, tables
from racdeploy.runtime.text import StreamDecoder
from racdeploy.runtime.thinking import ThinkingTags, split_completion
from racdeploy.tasks import extraction
from racdeploy.tasks.scorers import gym

SMALL, LARGE = 1_000, 8_000  # repeats
REPEATED = [
    *(
        "*",
        "(",
        "[",
        " ",
        "\n",
        "-",
        ".",
        ",",
        "1",
        "1,",
        "1 ",
        "a",
        "A ",
        "A. ",
        "a b\n",
        "’",
        "=",
        "::",
    ),
    *(
        "{",
        "}",
        "\\",
        "\\text{",
        "\\boxed{",
        "\\frac{1",
        "####",
        "answer ",
        "answer is",
        "is ",
        "</think>",
    ),
]
BEFORE = ["", "\\boxed{", "#### ", "the answer", "answer is ", "x = "]
AFTER = ["", "1}"]
OWN_SCORERS = sorted(set(plugins.list_names("scorers")) - {"gym", "ifeval", "math", "regex"})
"""The others have a library's or a user's expressions, and a process with limits of time."""
READERS: dict[str, Callable[[str], object]] = {
    "extract_boxed": extraction.extract_boxed,
    "extract_hash_mark": extraction.extract_hash_mark,
    "extract_last_number": extraction.extract_last_number,
    "final answer": gym.extract_answer,
    "parse_number": extraction.parse_number,
    "is_same_answer": lambda text: extraction.is_same_answer(text, "four apples"),
    "workflow command": lambda text: console._COMMAND.sub("", text),
    "unprintable": unprintable.replace_unprintable,
    "markdown": lambda text: markdown._SPECIAL.sub("", text),
    "number of a table": tables._NUMBER.match,
}


def score_with(name: str) -> Callable[[str], object]:
    module = plugins.load("scorers", name)
    return lambda text: module.score(text, "B", "")


READERS |= {f"scorer {name}": score_with(name) for name in OWN_SCORERS}


def measure_seconds(read: Callable[[int], object], repeats: int) -> float:
    """Return the seconds of processor time."""
    began_s = time.process_time()
    read(repeats)
    return time.process_time() - began_s


def check_growth(read: Callable[[int], object], what: str) -> None:
    """Eight times the text may take at most thirty times as long, or a twentieth of a second."""
    small_s = large_s = float("inf")
    for _ in range(12):  # a machine may be busy: during the long text, or the short one
        small_s = min(small_s, *(measure_seconds(read, SMALL) for _ in range(3)))
        large_s = min(large_s, measure_seconds(read, LARGE))
        if large_s < 30 * small_s + 0.05:
            return
    raise AssertionError(f"{what}: {small_s}, {large_s}")


@pytest.mark.parametrize("name", READERS)
def test_a_reader(name: str) -> None:
    read = READERS[name]
    for before, repeated, after in itertools.product(BEFORE, REPEATED, AFTER):
        what = f"{before!r} + {repeated!r} * N + {after!r}"
        check_growth(lambda repeats: read(before + repeated * repeats + after), what)  # noqa: B023


def test_an_expression_that_grows_faster_is_noticed() -> None:
    """Cubic: 512 times as long. 64 times, as of a square, is too near to 30 on a busy machine."""
    with pytest.raises(AssertionError, match="spaces"):
        check_growth(lambda repeats: re.findall(r" + +x", " " * (repeats // 10)), "spaces")


TAGS = ThinkingTags((1, 2, 3), (1, 2, 4), answer_ids=(1, 2, 5))


@pytest.mark.parametrize("ids", [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 3, 1, 2, 4], [9]])
@pytest.mark.parametrize("prompt", [[], [1, 2, 3], [1, 2, 4]])
def test_the_split_of_thinking(ids: list[int], prompt: list[int]) -> None:
    check_growth(
        lambda repeats: split_completion(prompt, ids * repeats, TAGS, eos_ids=(0,)), f"{ids}"
    )


class _Encoder:
    """Decodes every token to a part of a character that never becomes whole."""

    @property
    def tokenizer(self) -> _Encoder:
        return self

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return ["".join("\ufffd" for _ in ids) for ids in sequences]


def test_a_stream_of_half_characters() -> None:
    """It is shown in pieces, and not decoded again from its start for each token."""

    def read(repeats: int) -> None:
        shown: list[str] = []
        decoder = StreamDecoder(_Encoder(), [], None, (), lambda text, kind: shown.append(text))  # type: ignore[arg-type]
        for _ in range(repeats):
            decoder.feed(0, [7], None)
        decoder.finish()
        assert "".join(shown) == "\ufffd" * repeats

    check_growth(read, "half characters")

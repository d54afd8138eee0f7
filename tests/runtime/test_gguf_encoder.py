"""The tokenizer of a GGUF file survives every text: its process is replaced when it dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from racdeploy.engines.backends import llamacpp
from racdeploy.runtime.gguf_encoder import GgufTokenizer
from tests.support.errors import raises
from tests.support.spoiled_gguf import set_pre_tokenizer
from tests.support.tiny_artifacts import make_gguf
from tests.support.waiting import wait_for

# Each of these pre-tokenizers calls itself for every character of such a text.
LONG_TEXTS = {
    "tekken": "a" * 32_768,
    "deepseek-v3": "\n" * 32_768,
    "falcon": "!" * 32_768,
    "viking": "1" * 32_768,
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def tokenizer(gguf: Path) -> Iterator[GgufTokenizer]:
    tokenizer = GgufTokenizer(gguf)
    yield tokenizer
    tokenizer.close()


def kill(tokenizer: GgufTokenizer) -> None:
    """Kill the tokenizer's process, and wait until that is noticed."""
    os.kill(tokenizer.engine.pid, signal.SIGKILL)
    wait_for(lambda: not tokenizer.is_alive(), "the tokenizer to notice")


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_the_longest_text_of_one_character_is_encoded(
    name: str, gguf: Path, tmp_path: Path
) -> None:
    """The ids say the text, and the same process encodes the next one."""
    text = LONG_TEXTS[name]
    tokenizer = GgufTokenizer(set_pre_tokenizer(gguf, tmp_path / "m.gguf", name))
    process = tokenizer.engine.pid

    ids, few_ids = tokenizer.encode_batch([text, text[:100]])
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(few_ids) == text[:100]
    assert tokenizer.engine.pid == process
    tokenizer.close()


def test_a_process_that_was_killed_is_replaced(tokenizer: GgufTokenizer) -> None:
    """Its ids are the same, and it counts as dead until then."""
    ids = tokenizer.encode("Hello, world")
    kill(tokenizer)
    assert tokenizer.encode("Hello, world") == ids
    assert tokenizer.is_alive()


def test_a_text_that_takes_too_long_is_refused_and_the_next_is_encoded(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This pre-tokenizer tries every way to split a number into groups of three digits."""
    monkeypatch.setattr(llamacpp, "_VOCABULARY_STEP_S", 1.0)
    tokenizer = GgufTokenizer(set_pre_tokenizer(gguf, tmp_path / "m.gguf", "superbpe"))
    ids = tokenizer.encode("Hello, world")

    with raises("text-ends-tokenizer", "32,768 characters"):
        tokenizer.encode("1" * 32_768)
    assert tokenizer.is_alive()
    assert tokenizer.encode("Hello, world") == ids
    tokenizer.close()


def test_a_file_that_changed_is_not_read_in_place_of_the_first(gguf: Path, tmp_path: Path) -> None:
    """Otherwise a prompt would be written in the tokens of another model."""
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf.read_bytes())
    tokenizer = GgufTokenizer(file)
    set_pre_tokenizer(gguf, file, "tekken")
    kill(tokenizer)

    with raises("artifact-changed"):
        tokenizer.encode("Hello")
    assert not tokenizer.is_alive()
    tokenizer.close()


def test_a_closed_tokenizer_starts_no_process(tokenizer: GgufTokenizer) -> None:
    """It says that it is closed."""
    tokenizer.close()
    with raises("engine-closed"):
        tokenizer.encode("Hello")
    assert not tokenizer.is_alive()

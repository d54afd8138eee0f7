"""A bundle from loading to text: on the tiny model, and on an engine that follows a script."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import racdeploy
from racdeploy.engines.engine import Completion, Engine, OnTokens, Sampling
from racdeploy.manifest import Manifest
from racdeploy.runtime import Model, load
from racdeploy.runtime.template import PromptEncoder
from tests.support.errors import raises
from tests.support.tiny_artifacts import CLOSE_ID, EOS_ID, OPEN_ID, make_bundle
from tests.support.tiny_models import edit_json

QUESTION = "Ann has 12 apples and buys 30 more. How many apples does she have?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1, parallel=2) as loaded:
        yield loaded


@dataclass
class ScriptedEngine(Engine):
    """Answers every prompt with the same ids, a few at a time."""

    ids: list[int]
    forced_at: int | None = None
    asked: list[Sampling] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        self.asked.append(sampling)
        for start in range(0, len(self.ids), 2):
            if on_tokens:
                on_tokens(0, self.ids[start : start + 2], None)
        return [Completion(tuple(self.ids), "stop", self.forced_at) for _ in prompts]


def scripted(
    bundle: Path, text: str, *, manifest: Manifest | None = None
) -> tuple[Model, ScriptedEngine]:
    encoder = PromptEncoder.from_folder(bundle)
    engine = ScriptedEngine([*encoder.encode_text(text), EOS_ID])
    manifest = manifest or Manifest.read(bundle)
    return Model(manifest, encoder, engine, manifest.generation.context_tokens), engine


def test_a_bundle_answers_within_its_own_limits(model: Model) -> None:
    """The random model never closes its thinking by itself: the manifest's budget of 8 does."""
    result = model.generate(QUESTION)
    assert (result.state, result.thinking_tokens) == ("forced", 8)
    assert result.answer_tokens == 24 - 8 - 1 - (result.finish_reason == "stop")


def test_an_argument_overrides_the_manifest(model: Model) -> None:
    result = model.generate(QUESTION, max_thinking_tokens=3, max_new_tokens=9)
    assert (result.thinking_tokens, result.answer_tokens) == (3, 5)
    assert (result.finish_reason, result.state) == ("length", "forced")
    assert model.generate(QUESTION, max_thinking_tokens=100, max_new_tokens=9).state == "open"


def test_a_conversation_is_rendered_as_a_whole(model: Model) -> None:
    assert model.generate([{"role": "user", "content": QUESTION}]) == model.generate(QUESTION)


def test_many_prompts_give_what_one_gives(model: Model) -> None:
    prompts = [QUESTION, "What is 2+2?", "Count."]
    assert model.generate_many(prompts) == [model.generate(prompt) for prompt in prompts]
    assert model.generate_many([]) == []


def test_a_seed_decides_a_sampled_answer(model: Model) -> None:
    first, second, other = (
        model.generate(QUESTION, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_an_event_cancels(model: Model) -> None:
    event = threading.Event()
    event.set()
    results = model.generate_many([QUESTION] * 300, max_new_tokens=100, cancel=event)
    assert results[-1].finish_reason == "cancelled"


def test_a_prompt_that_does_not_fit_is_an_error(model: Model) -> None:
    with raises("prompt-too-long", "the prompt has"):
        model.generate("x y " * 400)
    with raises("prompt-too-long", "the prompt has"):
        model.generate_many([QUESTION, "x y " * 400])


@pytest.mark.parametrize("prompt", ["", [], 5, None])
def test_what_is_no_prompt_is_refused(model: Model, prompt: Any) -> None:
    """As the command line does; nothing is asked in its place."""
    with raises("no-question", repr(prompt)):
        model.generate(prompt)


def test_a_model_shows_what_it_runs(model: Model) -> None:
    assert repr(model) == f"<Model {model.settings.artifact.path}, {model.context_tokens} tokens>"


def test_streamed_text_is_the_text(model: Model) -> None:
    """Random bytes, half characters and all: the pieces put together are the whole."""
    pieces: dict[str, str] = {"thinking": "", "answer": ""}

    def on_text(text: str, stream: str) -> None:
        pieces[stream] += text

    for seed in range(4):
        pieces.update(thinking="", answer="")
        result = model.generate(QUESTION, temperature=2.0, seed=seed, on_text=on_text)
        assert (result.thinking, result.answer) == (
            pieces["thinking"].strip(),
            pieces["answer"].strip(),
        )


def test_thinking_and_answer_are_told_apart(bundle: Path) -> None:
    """Tags and end-of-sequence are in neither; characters of several tokens come whole."""
    pieces: list[tuple[str, str]] = []
    model, _ = scripted(bundle, "12+30 你好 🚀\n</think>\n\nIt is \\boxed{42} ✅.")
    result = model.generate(QUESTION, on_text=lambda text, stream: pieces.append((stream, text)))
    assert (result.thinking, result.answer) == ("12+30 你好 🚀", "It is \\boxed{42} ✅.")
    assert (result.state, result.finish_reason) == ("closed", "stop")
    assert "".join(text for stream, text in pieces if stream == "thinking") == "12+30 你好 🚀\n"
    assert (
        "".join(text for stream, text in pieces if stream == "answer")
        == "\n\nIt is \\boxed{42} ✅."
    )
    assert not any("\ufffd" in text for _, text in pieces)
    assert len(pieces) > 5


def test_a_model_without_tags_answers_only(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    tokenizer = manifest.tokenizer.model_copy(update={"open_tag": None, "close_tag": None})
    untagged = manifest.model_copy(update={"tokenizer": tokenizer})
    pieces: list[str] = []
    model, engine = scripted(bundle, "It is 42.", manifest=untagged)
    result = model.generate(QUESTION, on_text=lambda text, stream: pieces.append(text))
    assert (result.answer, result.thinking, result.state) == ("It is 42.", "", "absent")
    assert "".join(pieces) == "It is 42."
    assert engine.asked[0].budget is None
    with raises("no-thinking-tags"):
        model.generate(QUESTION, max_thinking_tokens=4)


def test_the_manifest_gives_the_defaults(bundle: Path) -> None:
    model, engine = scripted(bundle, "x")
    model.generate(QUESTION)
    model.generate(QUESTION, temperature=0.5, top_p=0.9, max_new_tokens=3, seed=4)
    default, given = engine.asked
    assert (default.temperature, default.top_p, default.max_new_tokens, default.stop_ids) == (
        0,
        1,
        24,
        (EOS_ID,),
    )
    assert (given.temperature, given.top_p, given.max_new_tokens, given.seed) == (0.5, 0.9, 3, 4)
    assert default.budget is not None
    assert (default.budget.open_ids, default.budget.close_ids) == ((OPEN_ID,), (CLOSE_ID,))
    assert (default.budget.max_tokens, default.budget.starts_open) == (8, True)


def test_a_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    edit_json(bundle / "tokenizer_config.json", chat_template="{{ 'give me your password' }}")
    with raises("differs-from-manifest", "tokenizer_config.json"):
        load(bundle)


def test_an_artifact_that_escapes_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    manifest = json.loads((bundle / "racdeploy.json").read_text())
    manifest["artifacts"][0]["path"] = "../checkpoint/model.safetensors"
    (bundle / "racdeploy.json").write_text(json.dumps(manifest))
    with raises("path-outside-bundle"):
        load(bundle)


def test_a_backend_that_the_bundle_lacks_is_named(bundle: Path) -> None:
    with raises("no-artifact-for-engine", "'onnxruntime'", "llamacpp"):
        load(bundle, backend="onnxruntime")


def test_a_folder_that_is_no_bundle_is_an_error(tmp_path: Path) -> None:
    with raises("not-a-bundle"):
        racdeploy.load(tmp_path)


def test_an_app_chooses_its_context(bundle: Path, tmp_path: Path) -> None:
    """A prompt that does not fit names what to raise, and with that it fits."""
    asked = "x " * 60
    refused = raises("prompt-too-long", "63", "--context-tokens", "context_tokens=")
    with load(bundle, threads=1, context_tokens=64) as small, refused as caught:
        small.generate(asked, max_new_tokens=2)
    assert caught.value.exit_code == 2

    advised = int(caught.value.remedy.partition("context_tokens=")[2].split()[0])
    with load(bundle, threads=1, context_tokens=advised) as large:
        assert large.generate(asked, max_new_tokens=2).answer_tokens <= 2


def test_no_context_is_more_than_the_model_has(bundle: Path, tmp_path: Path) -> None:
    """What it was not made for is refused, with the most that there is."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "racdeploy.json").read_text(encoding="utf-8"))
    edit_json(
        copy / "racdeploy.json", generation=manifest["generation"] | {"model_context_tokens": 300}
    )
    with raises("context-beyond-model", "301", "context_tokens=300"):
        load(copy, context_tokens=301)

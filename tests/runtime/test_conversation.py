"""A conversation: what the model is shown of earlier turns, what no longer fits, and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import racdeploy
from racdeploy.engines.engine import Completion, Engine, Sampling
from racdeploy.manifest import Manifest
from racdeploy.runtime import Conversation, Model
from racdeploy.runtime.template import PromptEncoder
from tests.support.errors import raises
from tests.support.tiny_artifacts import EOS_ID, make_bundle

# What the templates of three models do with an assistant's turn, abbreviated to that.
_BEGIN = "{%- for message in messages %}{%- set content = message['content'] %}"
_END = "{%- endfor %}{{- '<|im_start|>assistant\\n<think>\\n' }}"
_OTHERS = "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}"
_QWEN3 = (
    """
{%- set last_query_index = messages|length - 1 %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set reasoning_content = '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set reasoning_content = content.split('</think>')[0].split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == "assistant" and loop.index0 > last_query_index and reasoning_content %}
        {{- '<think>' + reasoning_content + '</think>' }}
    {%- endif %}
"""
    + _OTHERS
    + _END
)
_R1 = (
    _BEGIN + "{%- if message['role'] == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1] | trim %}{%- endif %}" + _OTHERS + _END
)
_SMOLLM3 = _BEGIN + _OTHERS.replace("+ content", "+ content.lstrip('\\n')") + _END
_CUTTING = {"qwen3": _QWEN3, "r1": _R1}


class _Scripted(Engine):
    """Says the same to every prompt, and keeps the prompts."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.prompts: list[Sequence[int]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *_: object, **__: object
    ) -> list[Completion]:
        self.prompts.extend(prompts)
        return [Completion((*self.ids, EOS_ID), "stop") for _ in prompts]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def _model(bundle: Path, says: str, template: str = "", context_tokens: int = 256) -> Model:
    encoder = PromptEncoder.from_folder(bundle)
    if template:
        encoder = encoder.with_template(template)
    engine = _Scripted(encoder.encode_text(says))
    return Model(Manifest.read(bundle), encoder, engine, context_tokens)


def _last_prompt(model: Model) -> str:
    assert isinstance(model.engine, _Scripted)
    return model.encoder.decode(model.engine.prompts[-1])


@pytest.mark.parametrize("name", sorted(_CUTTING))
def test_a_cutting_template_gives_what_it_gives_of_whole_turns(bundle: Path, name: str) -> None:
    """Answers alone, or with the thoughts that the template cuts: the prompts are equal."""
    model = _model(bundle, "2+2\n</think>\n\nIt is 4.", _CUTTING[name])
    talk = Conversation(model, "Be brief.")
    talk.ask("What is 2+2?")
    talk.ask("Why?")

    whole = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "<think>\n2+2\n</think>\n\nIt is 4."},
        {"role": "user", "content": "Why?"},
    ]
    assert model.encoder.render(whole) == _last_prompt(model)


def test_a_template_that_cuts_nothing_gets_answers_alone(bundle: Path) -> None:
    """It would write the whole thought, which no model card advises."""
    model = _model(bundle, "2+2\n</think>\n\nIt is 4.", _SMOLLM3)
    talk = Conversation(model)
    talk.ask("What is 2+2?")
    talk.ask("Why?")

    said = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert said + asked == _last_prompt(model)
    assert talk.turns[0].result.thinking == "2+2"


def test_a_turn_without_an_answer_is_not_shown(bundle: Path) -> None:
    """Its thinking never ended: the next prompt begins as if it had not been asked."""
    model = _model(bundle, "I wonder")
    talk = Conversation(model)
    assert talk.ask("What is 2+2?").state == "open"
    assert talk.messages == []
    talk.ask("Why?")
    assert "2+2" not in _last_prompt(model)


def test_the_oldest_turns_are_dropped_where_the_context_ends(bundle: Path) -> None:
    """Half of it stays free; the newest question always stays, and what went does not return."""
    context_tokens = 160
    model = _model(bundle, "</think>\n\nIt is 4.", context_tokens=context_tokens)
    assert isinstance(model.engine, _Scripted)
    talk = Conversation(model)

    for number in range(12):
        talk.ask(f"What is {number}+{number}?", max_new_tokens=1000)

    assert all(len(ids) <= context_tokens // 2 for ids in model.engine.prompts)
    assert 0 < talk.dropped < 11
    assert len(talk.turns) == 12
    assert f"What is {talk.dropped}+{talk.dropped}?" == talk.messages[0]["content"]

    dropped = talk.dropped
    talk.ask("a", max_new_tokens=1)
    assert talk.dropped == dropped, "there is room now, and nothing more goes"


def test_nothing_is_dropped_for_a_question_that_fails(bundle: Path) -> None:
    with racdeploy.load(make_bundle(bundle.parent / "own"), threads=1) as model:
        talk = Conversation(model)
        talk.ask("What is 2+2?")
        with raises("prompt-too-long"):
            talk.ask("x y " * 400)
        assert (len(talk.turns), talk.dropped) == (1, 0)


def test_reset_forgets(bundle: Path) -> None:
    model = _model(bundle, "</think>It is 4.")
    talk = Conversation(model, "Be brief.")
    talk.ask("What is 2+2?")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_saved_conversation_is_loaded(bundle: Path, tmp_path: Path) -> None:
    """With thoughts, and the next question gets the same prompt."""
    model = _model(bundle, "2+2 你好\n</think>\n\nIt is 4.")
    talk = racdeploy.Conversation(model, "Be brief.")
    talk.ask("What is 2+2?")
    talk.save(tmp_path / "talk.json")

    again = racdeploy.Conversation.load(model, tmp_path / "talk.json")
    assert (again.turns, again.messages, again.dropped) == (talk.turns, talk.messages, 0)
    again.ask("Why?")
    prompt = _last_prompt(model)
    talk.ask("Why?")
    assert prompt == _last_prompt(model)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"turns": [{"question": "x"}]}, "turns.0.result: "),
        ({"turns": 3}, "turns: "),
        ({"dropped": -1}, "dropped: "),
        ({"more": 1}, "more: "),
    ],
)
def test_a_damaged_file_is_refused(
    bundle: Path, tmp_path: Path, change: dict[str, object], field: str
) -> None:
    model = _model(bundle, "x")
    file = tmp_path / "talk.json"
    Conversation(model).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with raises("not-a-conversation", field):
        Conversation.load(model, file)

"""Template and tokens: ids that differ, an artifact with a template of its own, and a lost
end-of-sequence.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from racdeploy import exporting
from racdeploy.engines.backends.transformers import chat_prompt_ids
from racdeploy.extras import installed_release
from racdeploy.models.sources import EMBEDDED, resolve_model
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.checks import template, tokens
from racdeploy.verification.evidence import Evidence, Outcome, StopIds, TokenProbe
from racdeploy.verification.measurements import probe_prompts, probe_shipped_prompts, read_stop_ids
from tests.support.errors import raises
from tests.support.evidence import make_evidence
from tests.support.records import arm_of, record
from tests.support.tiny_models import edit_json, write_tokenizer

QUESTIONS = ["2 + 2?", "Is <think> a tag?", "日本語 🙂\n\ttabs", ""]

PREFIX = exporting.load("gguf").TOKENIZER_PREFIX


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def _evidence(**more: object) -> Evidence:
    arm = arm_of([record(0)])
    return make_evidence(arm, arm, **more)


def _checked(folder: Path, metadata: dict[str, object], expected: dict[str, list[int]]) -> Outcome:
    return template.check(
        _evidence(
            prompts=probe_shipped_prompts(PromptEncoder.from_folder(folder), metadata, expected)
        )
    )


def _expected(folder: Path) -> dict[str, list[int]]:
    return dict(zip(QUESTIONS, chat_prompt_ids(folder, QUESTIONS), strict=True))


def test_prompts_equal_those_of_transformers(folder: Path) -> None:
    """Our rendering and transformers' own, id by id."""
    found = _checked(folder, {}, _expected(folder))
    assert (found.verdict, found.summary) == ("pass", "4 prompts, equal ids")


def test_a_foreign_tokenizer_class_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Else transformers warns that the embedded model names a class of Qwen2; other warnings of it
    stay on.
    """
    assert chat_prompt_ids(resolve_model(EMBEDDED).folder, ["2 + 2?"])
    assert caplog.messages == []
    if installed_release("transformers") < (5,):  # later ones do not warn
        PreTrainedTokenizerFast.from_pretrained(resolve_model(EMBEDDED).folder)
        assert "not the same type as the class" in caplog.text


def test_a_beginning_that_the_tokenizer_demands_may_stand_in_front(folder: Path) -> None:
    """Templates may leave it out; it is written once."""
    expected = _expected(folder)
    edit_json(folder / "tokenizer_config.json", add_bos_token=True, bos_token="<|endoftext|>")
    encoder = PromptEncoder.from_folder(folder)
    assert encoder.encode("2 + 2?")[1:] == expected["2 + 2?"]
    assert _checked(folder, {}, expected).verdict == "pass"


def test_a_changed_template_is_shown_with_its_first_difference(folder: Path) -> None:
    """The question, the place and the ids."""
    expected = _expected(folder)
    source = PromptEncoder.from_folder(folder).template.source
    edit_json(folder / "tokenizer_config.json", chat_template=source.replace("<think>", ""))
    found = _checked(folder, {}, expected)
    assert (found.verdict, found.figures["different"]) == ("fail", 4)
    assert found.summary.startswith("4 of 4 prompts differ; the first is '2 + 2?': at token ")


def test_the_template_inside_the_artifact_is_rendered_too(folder: Path) -> None:
    """llama.cpp's server and Ollama see only that one."""
    expected = _expected(folder)
    source = PromptEncoder.from_folder(folder).template.source
    assert (
        "the artifact's own template too"
        in _checked(folder, {"tokenizer.chat_template": source}, expected).summary
    )
    found = _checked(folder, {"tokenizer.chat_template": source.replace("<think>", "")}, expected)
    assert (found.verdict, found.figures["different"], found.figures["different_artifact"]) == (
        "fail",
        0,
        4,
    )
    assert "by the artifact's own template" in found.summary
    with raises("template-failed"):
        _checked(folder, {"tokenizer.chat_template": "{% for %}"}, expected)


def test_nothing_recorded_is_inconclusive(folder: Path) -> None:
    """Records without prompt ids prove nothing."""
    assert _checked(folder, {}, {"2 + 2?": []}).verdict == "inconclusive"
    assert _checked(folder, {}, {}).verdict == "inconclusive"


def test_other_thinking_tags_are_a_finding(folder: Path) -> None:
    """Of equal prompts, too: where a tag is a token, another name for it has the same id."""
    encoder, expected = PromptEncoder.from_folder(folder), _expected(folder)
    prompts = probe_prompts(encoder, expected)
    found = template.check(_evidence(prompts=prompts, open_tags=("<think>", "<thought>")))
    assert found.verdict == "fail"
    assert "thoughts begin with <think> in the reference, with <thought> in" in found.summary
    assert "0 of 4 prompts differ" in found.summary
    found = template.check(_evidence(prompts=prompts, open_tags=("<think>", "")))
    assert "with no tag in the candidate" in found.summary
    found = template.check(_evidence(prompts=prompts, open_tags=("<think>", "<think>")))
    assert found.verdict == "pass"


@pytest.mark.parametrize(
    ("actual", "known", "verdict"),
    [(6, (6, 5), "pass"), (5, (5,), "pass"), (6, (6,), "fail"), (7, (5, 7), "fail")],
)
def test_a_candidate_stops_where_the_reference_does(
    actual: int, known: tuple[int, ...], verdict: str
) -> None:
    """Not only at one of its ids: a chat model that stops as its base model did never stops."""
    stop = StopIds((5, 6), actual, known)
    found = tokens.check(_evidence(probes=(TokenProbe("a", (1,), (1,)),), stop_ids=stop))
    assert found.verdict == verdict
    assert ("most answers end with 5" in found.summary) == (verdict == "fail")


@pytest.mark.parametrize(
    ("metadata", "verdict", "said"),
    [
        ({"tokenizer.ggml.eos_token_id": 5}, "pass", "equal ids"),
        (
            {"tokenizer.ggml.eos_token_id": 7},
            "fail",
            "names id 7 as its end-of-sequence, the checkpoint [5, 6]",
        ),
        ({"tokenizer.ggml.pre": "qwen2"}, "fail", "names none as its end-of-sequence"),
        ({}, "pass", "equal ids"),
    ],
)
def test_the_end_of_sequence_is_the_checkpoints(
    metadata: dict[str, object], verdict: str, said: str
) -> None:
    """A file that names another one, or none, fails; one without a tokenizer has nothing to say."""
    probes = (TokenProbe("a", (1,), (1,)),)
    found = tokens.check(_evidence(probes=probes, stop_ids=read_stop_ids(PREFIX, metadata, (5, 6))))
    assert (found.verdict, said in found.summary) == (verdict, True)
    assert StopIds((5, 6), 7) == read_stop_ids(PREFIX, {"tokenizer.ggml.eos_token_id": 7}, [5, 6])
    assert read_stop_ids("", {"tokenizer.ggml.eos_token_id": 7}, [5, 6]) is None

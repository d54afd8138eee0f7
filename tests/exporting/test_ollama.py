"""A chat template in Ollama's language writes what the model's own Jinja template writes, or is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from racdeploy.exporting.gguf.programs import make_go_template
from racdeploy.runtime.template import ChatTemplate, Message
from racdeploy.sandbox.client import Sandbox

TURN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
LOOP = "{% for m in messages %}"
SAME = {
    "chatml": LOOP + CHATML + "{% endfor %}" + TURN,
    "opens the thinking": LOOP + CHATML + "{% endfor %}{{ '<|im_start|>assistant\\n<think>\\n' }}",
    "a system message of its own": "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}"
    + LOOP
    + CHATML
    + "{% endfor %}"
    + TURN,
    "cuts thoughts out of the past": "{{ bos_token }}"
    + LOOP
    + "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<U>' + m.content }}{% else %}"
    "{{ '<A>' + m.content.split('</think>')[-1] + '<E>' }}{% endif %}{% endfor %}"
    "{{ '<A><think>\\n' }}",
    "no system message": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}"
    + LOOP
    + "{{ '<t>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim"
    " + '</t>\\n' }}{% endfor %}"
    "{{ '<t>model\\n' }}",
    "nothing at all": LOOP + "{{ m.content }}{% endfor %}",
}
REFUSED = {
    "system in the last question": LOOP + "{% if m.role == 'user' %}[INST] "
    "{{ messages[0].content if loop.last and messages[0].role == 'system' else '' }}"
    "{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}",
    "counts the messages": LOOP + "{{ '<' ~ loop.index ~ '>' + m.content }}{% endfor %}" + TURN,
    "capitals": LOOP + "{{ '<' + m.role + '>' + m.content | upper }}{% endfor %}" + TURN,
    "twice": LOOP + "{{ m.content + m.content }}{% endfor %}" + TURN,
    "braces": LOOP + "{{ '{{' + m.role + '}}' + m.content }}{% endfor %}" + TURN,
    "always fails": "{{ raise_exception('no') }}",
}
LONG: list[Message] = [
    {"role": role, "content": f"{role}: what is {number} + 1?"}
    for number, role in enumerate(("system", *("user", "assistant") * 4, "user"))
]
BOS = "<s>"
READER = Sandbox("racdeploy.sandbox.text_operations")


def _render(source: str, messages: Sequence[Message]) -> str:
    return ChatTemplate(source, BOS, "</s>", sandbox=READER).render(messages)


def run_go(source: str, messages: Sequence[Message]) -> str:
    """Run the few constructs of Go's text/template that are used; checked against Go's own once."""
    body, end, turn = source.removeprefix("{{ range $i, $m := .Messages }}").rpartition(
        "{{ end }}{{ end }}"
    )
    assert end
    pieces = re.split(r'\{\{ (?:else )?if eq \$m\.Role "(\w+)" \}\}', body)
    assert pieces[0] == ""
    branches = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    written = ""
    for index, message in enumerate(messages):
        text = branches.get(message["role"], "")
        text = re.sub(
            r"\{\{ if eq \$i 0 \}\}(.*?)\{\{ end \}\}",
            r"\1" if index == 0 else "",
            text,
            flags=re.DOTALL,
        )
        written += text.replace("{{ $m.Content }}", message["content"])
    assert "{{" not in written
    return written + turn


@pytest.mark.parametrize("name", SAME)
def test_the_go_template_writes_the_same_prompt(name: str) -> None:
    """Conversations of every length, with and without a system message, but for what the tokenizer
    puts in front.
    """
    source = SAME[name]
    found, reason = make_go_template(lambda messages: _render(source, messages), BOS)
    assert reason == ""
    starts = (1,) if "raise_exception" in source else (0, 1)
    for start in starts:
        for stop in range(start + 1 + (start == 0), len(LONG) + 1, 2):
            messages = LONG[start:stop]
            assert run_go(found, messages) == _render(source, messages).removeprefix(BOS), messages


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_said_is_refused(name: str) -> None:
    """Where messages are moved, changed or counted there is a reason and no template."""
    found, reason = make_go_template(lambda messages: _render(REFUSED[name], messages), BOS)
    assert (found, bool(reason)) == ("", True)


def test_a_beginning_that_the_tokenizer_does_not_add_stays() -> None:
    """It is written out, at the front of the whole prompt alone."""
    source = SAME["cuts thoughts out of the past"]
    found, _ = make_go_template(lambda messages: _render(source, messages), "")
    assert run_go(found, LONG[1:4]) == _render(source, LONG[1:4])
    assert run_go(found, LONG[:4]).count(BOS) == 1

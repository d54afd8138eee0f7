"""Chat templates, as prompts and Modelfiles are made of them.

They are compiled and rendered in this process; one in a hundred, and each that reaches a limit, in
a process of its own too, which gives the same text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from racdeploy.errors import ArtifactError, RacdeployError
from racdeploy.exporting.gguf.programs import make_go_template
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.runtime.template import ChatTemplate
from racdeploy.sandbox.client import Sandbox
from tests.fuzz.in_process import InProcess, reaches_limits
from tests.fuzz.oracle import apart, check_words, expect, forgive, place

READERS = (
    "racdeploy.sandbox.chat_template",
    "racdeploy.sandbox.text_operations",
    "racdeploy.exporting.gguf.programs",
)
DICTIONARY = (
    *(b"{% for message in messages %}", b"{% endfor %}", b"{{ message['content'] }}", b"{% if "),
    *(b"{% endif %}", b"{% set ", b"namespace(", b"{% macro ", b"{% endmacro %}", b"{%- ", b" -%}"),
    *(b"|tojson", b"|trim", b"|join(", b"|replace(", b"raise_exception(", b"strftime_now("),
    *(b"{% generation %}", b"{% endgeneration %}", b"{% break %}", b"loop.index0", b"[::-1]"),
    *(b"add_generation_prompt", b"enable_thinking", b"tools", b"bos_token", b"is defined", b"#}"),
)
# Other every time, or at another moment.
_VARIES = re.compile("random|strftime_now|cycler|joiner|0x[0-9a-f]")
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 times 34?"},
    {"role": "assistant", "content": "408", "reasoning_content": "12 * 34"},
    {"role": "user", "content": "And 13?"},
]
_CASES: Sequence[Sequence[Mapping[str, Any]]] = (_TALK, _TALK[1:2], [])


def target(data: bytes) -> None:
    """Render conversations, and derive a Go template."""
    source = _read(data)
    with reaches_limits() as over:
        ours = _render(source, InProcess("racdeploy.sandbox.text_operations"))
    if over[0]:
        forgive()
    if over[0] or hashlib.sha256(data).digest()[0] < 3:
        _compare(source, ours, over[0])
    if not over[0] and not isinstance(ours[0], RacdeployError):
        _derive(source)


def _read(data: bytes) -> str:
    folder = place("chat_template.jinja", data).parent
    return TokenizerFiles(folder).chat_template


def _render(source: str, reader: Sandbox) -> list[str | RacdeployError]:
    """Return the text of each conversation, or the error in its place."""
    template = ChatTemplate(source, "<s>", "</s>", sandbox=reader)
    found: list[str | RacdeployError] = []
    for messages in _CASES:
        try:
            found.append(template.render(messages))
        except RacdeployError as error:
            check_words(error)
            expect(isinstance(error, ArtifactError), f"{error!r} is no fault of a file")
            found.append(error)
    return found


def _compare(source: str, ours: Sequence[str | RacdeployError], over: bool) -> None:
    """Render in a process with limits; where none is reached, it comes to the same."""
    with apart():
        theirs = _render(source, _reader())
    if over or _VARIES.search(source + "".join(map(str, ours))):
        return
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, str) or isinstance(other, str):
            expect(one == other, f"{str(one)[:200]!r} here, {str(other)[:200]!r} in a process")


def _derive(source: str) -> None:
    template = ChatTemplate(
        source, "<s>", "</s>", sandbox=InProcess("racdeploy.sandbox.text_operations")
    )
    with reaches_limits() as over:
        go, reason = make_go_template(template.render, "<s>")
    if over[0]:
        forgive()
    expect(not go or '"""' not in go, "it ends the quotes of a Modelfile")
    expect(bool(go) != bool(reason), "neither a Go template nor a reason")


@cache
def _reader() -> Sandbox:
    return Sandbox("racdeploy.sandbox.text_operations")


def survives(data: bytes) -> bool:
    """Return whether the product lives through an input that ended this process."""
    with apart():
        return len(_render(_read(data), _reader())) == len(_CASES)


def seeds() -> Iterator[bytes]:
    """Yield templates that use what those of models use."""
    yield from (text.encode() for text in _SEEDS)


_SEEDS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}",
    "{{ bos_token }}{%- set ns = namespace(found=false) -%}{%- for m in messages[::-1] -%}"
    "{%- if m.role == 'user' and not ns.found -%}{%- set ns.found = true -%}[INST]{{ m.content | "
    "trim }}[/INST]{%- endif -%}{%- endfor -%}",
    "{% macro show(x) %}{{ x.name }}: {{ x | tojson(indent=1) }}{% endmacro %}"
    "{% if tools is defined and tools %}{% for t in tools %}{{ show(t) }}{% endfor %}{% endif %}"
    "{{ messages|length }}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ strftime_now('%Y') }}{% generation %}{{ messages[-1]['content'].split('</think>')[-1] }}"
    "{% endgeneration %}",
    "{% for m in messages if loop is defined %}{% if loop.index0 > 1 %}{% break %}{% endif %}"
    "{{ m.content.replace('a', 'b') | upper }}{% endfor %}{% set x = {'a': [1, 2.5]} %}"
    "{{ x.a[0] }}",
    "{{ '%s' % messages }}{{ ['a', 'b'] | join(', ') }}{{ 7 // 2 }}{{ 2 ** 8 }}"
    "{{ range(3) | list }}",
)

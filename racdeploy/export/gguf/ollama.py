"""Translate a chat template to Ollama's Go template language, where possible.

It is derived from what Jinja writes round marked messages, and proved on other conversations.
Source: ``template/template.go`` of Ollama (``Named``, ``Execute``), and Go's text/template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from racdeploy.errors import ArtifactError
from racdeploy.runtime.template import Message

Render = Callable[[Sequence[Message]], str]
_ROLES = ("system", "user", "assistant", "user", "assistant", "user")
# Conversations that must come out alike: slices of the roles, with a system message and without
_LENGTHS = ((1, 2), (1, 4), (1, 6), (0, 2), (0, 4))


@dataclass(frozen=True)
class _Form:
    """What is written round messages: in front of and behind each, by role, and round them all.

    ``lead`` is in front of a first message of the user, ``turn`` where the model's turn begins.
    """

    lead: str
    opens: dict[str, str]
    closes: dict[str, str]
    turn: str

    def write(self, messages: Sequence[Message]) -> str:
        """Return the prompt that :meth:`go` makes of messages."""
        parts = ["" if messages[0]["role"] == "system" else self.lead]
        for message in messages:
            role = message["role"]
            parts += [self.opens[role], message["content"], self.closes[role]]
        return "".join(parts) + self.turn

    def go(self) -> str:
        """Return the Go template."""
        cases = []
        for role in self.opens:
            case = f'if eq $m.Role "{role}" }}}}'
            if role == "user" and self.lead:
                case += "{{ if eq $i 0 }}" + self.lead + "{{ end }}"
            cases.append(case + self.opens[role] + "{{ $m.Content }}" + self.closes[role])

        messages = "{{ range $i, $m := .Messages }}{{ " + "{{ else ".join(cases)
        return messages + "{{ end }}{{ end }}" + self.turn

    @property
    def has_braces(self) -> bool:
        """Whether Go's templates, or the quotes of a Modelfile, would read a part of the texts."""
        texts = [self.lead, self.turn, *self.opens.values(), *self.closes.values()]
        return any(re.search(r'{{|}}|"""', text) for text in texts)


def make_go_template(render: Render, bos: str) -> tuple[str, str]:
    """Return the Go template, and why there is none; one of them is empty.

    ``render`` gives a conversation's prompt; ``bos`` is what llama.cpp puts in front, or empty.
    """

    def write(messages: Sequence[Message]) -> str:
        return render(messages).removeprefix(bos)

    try:
        form = _derive(write)
        for start, stop in _LENGTHS:
            roles = _ROLES[start:stop]
            messages = _converse(roles, "other")
            if set(roles) <= set(form.opens) and write(messages) != form.write(messages):
                return "", "it writes a message differently in other places of a conversation"
    except ArtifactError as error:
        return "", f"it fails: {error.message}"
    except ValueError:
        return "", "it changes what messages say"

    if form.has_braces:
        return "", "it holds braces that Go's templates would read"

    return form.go(), ""


def _derive(render: Render) -> _Form:
    """Read the form off two conversations; a ValueError says that a message was changed."""
    first, to_assistant, to_user, last = _gaps(render, _ROLES[1:4])
    try:
        before, between, _ = _gaps(render, _ROLES[:2])
        takes_system = True
    except ArtifactError:  # the template refuses such messages, as the model does
        before, between, takes_system = "", first, False

    # A gap closes one message and opens the next. What opens the user's ends every gap in front of
    # one; what closes the user's begins both that follow one.
    user_open = _common_end(_common_end(first, to_user), between)
    user_close = _common_start(to_assistant, last)
    opens = {"user": user_open, "assistant": to_assistant.removeprefix(user_close)}
    closes = {"user": user_close, "assistant": to_user.removesuffix(user_open)}
    if takes_system:
        opens = {"system": before, **opens}
        closes = {"system": between.removesuffix(user_open), **closes}

    return _Form(first.removesuffix(user_open), opens, closes, last.removeprefix(user_close))


def _gaps(render: Render, roles: Sequence[str]) -> list[str]:
    messages = _converse(roles, "mark")
    text = render(messages)

    gaps = []

    for message in messages:
        gap, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            raise ValueError(message["content"])
        gaps.append(gap)

    return [*gaps, text]


def _common_start(left: str, right: str) -> str:
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(character for character, _ in alike)


def _common_end(left: str, right: str) -> str:
    return _common_start(left[::-1], right[::-1])[::-1]


def _converse(roles: Sequence[str], word: str) -> list[Message]:
    return [
        {"role": role, "content": f"{word} {number} of {role}."}
        for number, role in enumerate(roles)
    ]

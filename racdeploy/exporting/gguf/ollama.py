"""Translate a chat template to Ollama's Go template language, where possible.

The form is derived from the text that Jinja writes around marked messages, and then compared with
Jinja on other conversations.
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
# Conversations to compare: slices of the roles, with and without a system message
_LENGTHS = ((1, 2), (1, 4), (1, 6), (0, 2), (0, 4))


@dataclass(frozen=True)
class _Form:
    """Texts around messages: in front of and behind each, by role.

    ``lead`` is in front of a conversation that begins with the user, ``turn`` in front of the
    model's turn.
    """

    lead: str
    opens: dict[str, str]
    closes: dict[str, str]
    turn: str

    def write(self, messages: Sequence[Message]) -> str:
        """Return the prompt of messages, as the template of :meth:`go` writes it."""
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
        """True if a text holds braces of Go's templates or quotes of a Modelfile."""
        texts = [self.lead, self.turn, *self.opens.values(), *self.closes.values()]
        return any(re.search(r'{{|}}|"""', text) for text in texts)


def make_go_template(render: Render, bos: str) -> tuple[str, str]:
    """Return the Go template and an empty string, or an empty string and why there is none.

    Args:
        render: returns the prompt of a conversation.
        bos: text of the token that llama.cpp adds in front, or empty.
    """

    def write(messages: Sequence[Message]) -> str:
        return render(messages).removeprefix(bos)

    try:
        form = _derive(write)
        # A template may write later turns, or turns behind a system message, in another form.
        for start, stop in _LENGTHS:
            roles = _ROLES[start:stop]
            messages = _converse(roles, "other")
            if set(roles) <= set(form.opens) and write(messages) != form.write(messages):
                return "", "it writes a message differently elsewhere in a conversation"
    except ArtifactError as error:
        return "", f"it fails: {error.message}"
    except ValueError:
        return "", "it changes the text of messages"

    if form.has_braces:
        return "", "it holds braces that Go's templates would read"

    return form.go(), ""


def _derive(render: Render) -> _Form:
    """Return the form of two conversations, or raise a ValueError if a message was changed."""
    first, to_assistant, to_user, last = _gaps(render, _ROLES[1:4])
    try:
        before, between, _ = _gaps(render, _ROLES[:2])
        takes_system = True
    except ArtifactError:  # the template refuses system messages
        before, between, takes_system = "", first, False

    # A gap closes one message and opens the next. The text that opens a user message is the common
    # end of all gaps in front of one; the text that closes it is the common start of those behind.
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
        gap, content, text = text.partition(message["content"])
        if not content or message["content"] in text:
            raise ValueError(message["content"])
        gaps.append(gap)

    return [*gaps, text]


def _common_start(left: str, right: str) -> str:
    common = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(character for character, _ in common)


def _common_end(left: str, right: str) -> str:
    return _common_start(left[::-1], right[::-1])[::-1]


def _converse(roles: Sequence[str], word: str) -> list[Message]:
    return [
        {"role": role, "content": f"{word} {number} of {role}."}
        for number, role in enumerate(roles)
    ]

"""Say a chat template in Ollama's language, where that is possible.

Ollama does not run the Jinja template that a GGUF file holds: it takes a Go template of its own for those that it
knows, by edit distance, and the bare text of the question for all others. A Go template is derived here from what the
Jinja template writes round marked messages, and counts only if it gives the same text for other conversations. It knows
system, user and assistant messages; tools and settings such as ``enable_thinking`` keep the template's defaults.
Source: ``template/template.go`` of Ollama (``Named``, ``Execute``), and Go's text/template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from racdeploy.errors import ArtifactError
from racdeploy.runtime.template import Message

Render = Callable[[Sequence[Message]], str]
_ROLES = ("system", "user", "assistant", "user", "assistant", "user")
_LENGTHS = (
    (1, 2),
    (1, 4),
    (1, 6),
    (0, 2),
    (0, 4),
)  # conversations that must come out alike: slices of the roles


@dataclass(frozen=True)
class _Form:
    """What stands round messages.

    Args:
        lead: in front of a first message of the user.
        opens: in front of each message, by role.
        closes: behind each message, by role.
        turn: where the model's turn begins.
    """

    lead: str
    opens: dict[str, str]
    closes: dict[str, str]
    turn: str

    def write(self, messages: Sequence[Message]) -> str:
        """Return the prompt that :meth:`go` makes of messages."""
        texts = [self.opens[m["role"]] + m["content"] + self.closes[m["role"]] for m in messages]
        return ("" if messages[0]["role"] == "system" else self.lead) + "".join(texts) + self.turn

    def go(self) -> str:
        """Return the Go template."""
        parts: list[str] = []
        for role in self.opens:
            lead = (
                f"{{{{ if eq $i 0 }}}}{self.lead}{{{{ end }}}}"
                if role == "user" and self.lead
                else ""
            )
            test = f'{{{{ {"else if" if parts else "if"} eq $m.Role "{role}" }}}}'
            parts.append(f"{test}{lead}{self.opens[role]}{{{{ $m.Content }}}}{self.closes[role]}")
        return "{{ range $i, $m := .Messages }}" + "".join(parts) + "{{ end }}{{ end }}" + self.turn


def go_template(render: Render, bos: str) -> tuple[str, str]:
    """Return the Go template, and why there is none; one of them is empty.

    Args:
        render: the prompt text of a conversation, up to where the model's turn begins.
        bos: the text that llama.cpp's tokenizer puts in front by itself; empty where it puts nothing.
    """
    try:
        form = _derive(lambda messages: render(messages).removeprefix(bos))
        for start, stop in _LENGTHS:
            if start == 0 and "system" not in form.opens:
                continue
            messages = _conversation(_ROLES[start:stop], "other")
            if render(messages).removeprefix(bos) != form.write(messages):
                return "", "it writes a message otherwise in other places of a conversation"
    except ArtifactError as error:
        return "", f"it fails: {error.message}"
    except ValueError:
        return "", "it changes what messages say"
    literals = [form.lead, form.turn, *form.opens.values(), *form.closes.values()]
    if any(mark in text for text in literals for mark in ("{{", "}}", '"""')):
        return "", "it holds braces that Go's templates would read"
    return form.go(), ""


def _derive(render: Render) -> _Form:
    """Read the form off two conversations; a ValueError says that a message is not there as it was given."""
    first, to_assistant, to_user, last = _gaps(render, _ROLES[1:4])
    try:
        before, between, _ = _gaps(render, _ROLES[:2])
        takes_system = True
    except ArtifactError:  # the template refuses such messages, as the model does
        before, between, takes_system = "", first, False
    user_close = _common(to_assistant, last)
    backwards = _common(_common(first[::-1], to_user[::-1]), between[::-1])
    user_open = backwards[::-1]
    opens = {"user": user_open, "assistant": to_assistant[len(user_close) :]}
    closes = {"user": user_close, "assistant": to_user[: len(to_user) - len(user_open)]}
    lead, system_close = (text[: len(text) - len(user_open)] for text in (first, between))
    if takes_system:
        opens, closes = {"system": before, **opens}, {"system": system_close, **closes}
    return _Form(lead, opens, closes, last[len(user_close) :])


def _gaps(render: Render, roles: Sequence[str]) -> list[str]:
    """Return what stands in front of, between and behind the messages of a conversation."""
    messages = _conversation(roles, "mark")
    text, gaps = render(messages), []
    for message in messages:
        gap, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            raise ValueError(message["content"])
        gaps.append(gap)
    return [*gaps, text]


def _common(left: str, right: str) -> str:
    """Return the longest text that both begin with."""
    length = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    return left[:length]


def _conversation(roles: Sequence[str], word: str) -> list[Message]:
    return [
        {"role": role, "content": f"{word} {number} of {role}."}
        for number, role in enumerate(roles)
    ]

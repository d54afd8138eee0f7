"""Instructions for other programs to run a GGUF file: Ollama's Modelfile, and the model card.

A chat template is translated to Ollama's Go template language, where possible. The form is derived
from the text that Jinja writes around marked messages, and then compared with Jinja on other
conversations.

Source: ``template/template.go`` of Ollama (``Named``, ``Execute``), and Go's text/template.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from racdeploy import packing as packings
from racdeploy.errors import ArtifactError
from racdeploy.exporting.gguf.tokenizer import adds_bos
from racdeploy.files.templates import render_text
from racdeploy.files.unprintable import replace_unprintable
from racdeploy.manifest import ArtifactEntry, GenerationSettings, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant import IMATRIX_SUFFIX
from racdeploy.runtime.template import Message, PromptEncoder

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

    # Go's templates would read such braces, a Modelfile such quotes.
    texts = [form.lead, form.turn, *form.opens.values(), *form.closes.values()]
    if any(re.search(r'{{|}}|"""', text) for text in texts):
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


_OLLAMA_NAMES = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"}


def companions(manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Return an Ollama Modelfile: a Go template if possible, and context for whole thoughts."""
    entry = next(entry for entry in manifest.artifacts if entry.format == "gguf")
    encoder = PromptEncoder.from_folder(checkpoint.folder)
    # llama.cpp adds bos itself, so the template must not.
    bos = encoder.bos_token if adds_bos(checkpoint) else ""
    template, reason = make_go_template(encoder.render, bos)

    settings = manifest.generation
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    tokens = {i: text for text, i in encoder.tokenizer.get_vocab().items()}
    stops = [tokens[i] for i in manifest.tokenizer.eos_ids if i in tokens]

    # The other sampling settings that the model's authors recommend, by Ollama's names.
    recommended = {}
    for name, ollama_name in _OLLAMA_NAMES.items():
        value = checkpoint.tokenizer.generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            recommended[ollama_name] = value
    text = _render(
        "Modelfile.jinja",
        entry,
        template=template,
        reason=" ".join(replace_unprintable(reason).split()),
        sampling=sampling | recommended,
        context_tokens=settings.default_context_tokens,
        stops=list(filter(_fits_a_line, stops)),
    )

    return {"Modelfile": text}


def usage(entry: ArtifactEntry, settings: GenerationSettings) -> list[str]:
    """Return lines of the model card: how other programs run the file."""
    # llama-server's flags that control the thinking as verified; see its common/arg.cpp of 2026.
    control = settings.thinking
    flags = []
    if settings.max_thinking_tokens:
        flags += ["--reasoning-budget", str(settings.max_thinking_tokens)]
        if control.closing:
            flags += ["--reasoning-budget-message", control.closing.strip()]

    if control.hesitation_penalty:
        for token in control.hesitation_ids:
            flags += ["--logit-bias", f"{token}-{control.hesitation_penalty:g}"]
    text = _render(
        "usage.jinja",
        entry,
        context_tokens=settings.default_context_tokens,
        control=shlex.join(flags),
    )

    return [*packings.load_gguf(entry.packing).usage(entry.path), *text.splitlines()]


def _fits_a_line(stop: str) -> bool:
    """Return True if a token can be quoted in a line of a Modelfile."""
    return (
        stop == replace_unprintable(stop)
        and "\n" not in stop
        and '"""' not in stop
        and stop[-1:] != '"'
    )


def _render(name: str, entry: ArtifactEntry, **values: object) -> str:
    models = [name for name in entry.files if name.endswith(".gguf")]
    is_split = sum(not name.endswith(IMATRIX_SUFFIX) for name in models) > 1

    # A packed file is unpacked beside itself, under the name that programs read.
    file = f"{Path(entry.path).stem}.gguf" if entry.unpacked_sha256 else entry.path
    return render_text("racdeploy.exporting.gguf", name, file=file, is_split=is_split, **values)

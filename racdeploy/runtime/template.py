"""Turn messages into prompt ids: the model's chat template, then its tokenizer.

Both are a stranger's, so a process with limits computes them: :mod:`racdeploy.sandbox`. Rendering
equals transformers' ``apply_chat_template``; the tokenizer adds nothing.
"""

from __future__ import annotations

import copy
import itertools
import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.sandbox.ids import unpack_all
from racdeploy.sandbox.reader import SECONDS, Reader, Request
from racdeploy.sandbox.tokenizer import ENCODING_S_PER_CHARACTER, Tokenizer

Message = Mapping[str, Any]

LONGEST_TEMPLATE = 2**18  # characters; those of real models have up to 20,000
_COMPILING_S_PER_CHARACTER = 2e-6
_RENDERING_S_PER_CHARACTER = 5e-6  # of what it is rendered with
_FAILED = "the chat template failed"
_MARKS = tuple(map(chr, range(0xE000, 0xF8FF)))  # of private use
_numbers = itertools.count()


class ChatTemplate:
    """A chat template; a token that is None is undefined in it, ``reader`` computes it."""

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        reader: Reader,
    ) -> None:
        self.source = source
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self.tokens = {name: text for name, text in named.items() if text is not None}

        self.reader = reader
        self._name = f"template {next(_numbers)}"
        if len(source) > LONGEST_TEMPLATE:
            raise ArtifactError(
                "template-too-long",
                f"the chat template has {len(source)} characters, and may have {LONGEST_TEMPLATE}",
                remedy="use the template that the model was published with",
            )

        seconds = _COMPILING_S_PER_CHARACTER * len(source)
        compiling = self._make_request("compile_template", seconds, source=source)
        self.reader.keep(self._name, compiling)
        weakref.finalize(self, self.reader.forget, self._name)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text.

        Raises:
            ArtifactError: the template failed, or took too much.
            UsageError: a message is no JSON.
        """
        variables_json = self._write(messages)
        header, _ = self.reader.ask(self._request("render", variables_json))
        return str(header["text"])

    def encode(self, messages: Sequence[Message], lead: str, mark: str) -> list[int]:
        """Return the ids of the prompt text by the tokenizer of the same process.

        Args:
            lead: put in front of a text that does not begin with it.
            mark: left out of the text, which is encoded in pieces between marks.
        """
        variables_json = self._write(messages)
        request = self._request(
            "encode_rendered",
            variables_json,
            what=f"{_FAILED}, or the tokenizer",
            lead=lead,
            mark=mark,
            base_s=SECONDS,
            encoding_s=ENCODING_S_PER_CHARACTER,
            expected_characters=len(variables_json) + len(self.source),
        )
        _, payload = self.reader.ask(request)
        return unpack_all(payload)

    def _write(self, messages: Sequence[Message]) -> str:
        """Return as JSON what the template is rendered with."""
        given: dict[str, Any] = {"tools": None, "documents": None, **self.tokens}
        given |= {"messages": messages, "add_generation_prompt": True}

        try:
            return _write_json(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                "messages-not-json",
                f"messages and template variables must be JSON: {error}",
                remedy="give texts, numbers, lists and dicts",
            ) from error

    def _request(self, op: str, variables_json: str, what: str = _FAILED, **values: Any) -> Request:
        seconds = _RENDERING_S_PER_CHARACTER * len(variables_json)
        return self._make_request(op, seconds, what, variables=variables_json, **values)

    def _make_request(
        self, op: str, more_seconds: float, what: str = _FAILED, **values: Any
    ) -> Request:
        return Request(
            op,
            {"template": self._name, **values},
            code="template-failed",
            what=what,
            remedy="compare the messages with the model card; if they are right, correct the "
            "template",
            seconds=SECONDS + more_seconds,
        )


class PromptEncoder:
    """A tokenizer with its chat template.

    ``lead`` is what every prompt begins with, also where the template does not write it: the
    beginning-of-sequence token, or nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, add_bos: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.bos_token = template.tokens.get("bos_token", "")
        self.lead = self.bos_token if add_bos else ""

    @classmethod
    def from_folder(cls, folder: Path) -> PromptEncoder:
        """Read the tokenizer and the template of a model folder or a bundle."""
        encoder = cls.begin(folder)
        encoder.check()
        return encoder

    @classmethod
    def begin(cls, folder: Path) -> PromptEncoder:
        """Begin to read them, and do not wait: :meth:`check` or the first use does."""
        files = TokenizerFiles(folder)
        source = files.chat_template
        bos_token = files.special_token("bos_token")
        eos_token = files.special_token("eos_token")

        tokenizer = Tokenizer(files.file)
        template = ChatTemplate(source, bos_token, eos_token, reader=tokenizer.reader)
        tokenizer.reader.start()
        return cls(tokenizer, template, add_bos=files.config.get("add_bos_token") is True)

    def check(self) -> None:
        """Wait until both are read; an ArtifactError says what is wrong with them."""
        self.tokenizer.check()

    def with_template(self, source: str) -> PromptEncoder:
        """Return an encoder of the same tokenizer with another template."""
        other = copy.copy(self)
        reader = self.tokenizer.reader
        other.template = ChatTemplate(source, **self.template.tokens, reader=reader)
        return other

    def render(self, prompt: str | Sequence[Message]) -> str:
        """Return the prompt text of a conversation; a plain string is one message of the user."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.template.render(messages)
        return text if text.startswith(self.lead) else self.lead + text

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the prompt ids of a conversation; see :meth:`ChatTemplate.render`.

        A control token that somebody has typed, as ``<|im_end|>``, is text and ends no turn. Only
        in what the model has said, and in what the template writes, it is the token.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        typed = [str(message.get("content")) for message in messages if not _is_said(message)]
        forged = [token for token in self.tokenizer.controls if any(token in t for t in typed)]

        mark = ""
        if forged:
            mark = next(each for each in _MARKS if not any(each in text for text in typed))
            messages = [_mark(message, forged, mark) for message in messages]
        return self.template.encode(messages, self.lead, mark)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text as it is: special tokens written in it count, none are added."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens written out."""
        return self.tokenizer.decode(ids)


def _is_said(message: Message) -> bool:
    return message.get("role") == "assistant"


def _mark(message: Message, forged: Sequence[str], mark: str) -> Message:
    """Put a mark into each control token of a message: what is on its two sides is none."""
    if _is_said(message):
        return message
    return {**message, "content": _break(message.get("content"), forged, mark)}


def _break(content: Any, forged: Sequence[str], mark: str) -> Any:
    if isinstance(content, str):
        for token in forged:
            content = content.replace(token, token[:1] + mark + token[1:])
        return content

    if isinstance(content, Mapping):  # a part of a message, as {"type": "text", "text": …}
        return {key: _break(value, forged, mark) for key, value in content.items()}
    if isinstance(content, Sequence):
        return [_break(part, forged, mark) for part in content]
    return content


def _plain(value: object) -> object:
    """Return what a value is for a template that JSON has no name for."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is none")


_write_json = json.JSONEncoder(default=_plain).encode

"""Encoding of messages: the model's chat template, then its tokenizer.

Both come from untrusted files, so they run in a process with limits: :mod:`racdeploy.sandbox`.
Rendering equals transformers' ``apply_chat_template``; the tokenizer adds no special tokens.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.sandbox.client import DEFAULT_SECONDS, Sandbox, SandboxRequest
from racdeploy.sandbox.ids import all_ids_from_bytes
from racdeploy.sandbox.tokenizer import ENCODING_S_PER_CHARACTER, Tokenizer

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[Message]
"""A question, or messages with ``role`` and ``content``."""

MAX_TEMPLATE_CHARACTERS = 2**18  # characters; those of real models have up to 20,000
_COMPILING_S_PER_CHARACTER = 2e-6
_RENDERING_S_PER_CHARACTER = 5e-6  # of the template's variables
_TOOLS = re.compile(r"\btools\b")
_FAILED = "the chat template failed"
_MARKS = tuple(map(chr, range(0xE000, 0xF8FF)))  # Unicode private use area
_numbers = itertools.count()


class ChatTemplate:
    """A chat template, rendered by the process of ``sandbox``; a token of None is undefined."""

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        sandbox: Sandbox,
    ) -> None:
        self.source = source
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self.tokens = {name: text for name, text in named.items() if text is not None}

        self.sandbox = sandbox
        self._name = f"template {next(_numbers)}"
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ArtifactError(
                "template-too-long",
                f"the chat template has {len(source)} characters, the maximum is"
                f" {MAX_TEMPLATE_CHARACTERS}",
                remedy="use the template that the model was published with",
            )

        seconds = _COMPILING_S_PER_CHARACTER * len(source)
        compiling = self._request("compile_template", seconds, source=source)
        self.sandbox.add_setup(self._name, compiling)
        weakref.finalize(self, self.sandbox.remove_setup, self._name)

    @property
    def sha256(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Render messages to the prompt text.

        Args:
            tools: functions that the model may call, in OpenAI's form.

        Raises:
            ArtifactError: the template failed, or exceeded its time or memory.
            UsageError: a message is not JSON, or the template has no tools.
        """
        variables_json = self._write(messages, tools)
        seconds = _RENDERING_S_PER_CHARACTER * len(variables_json)
        answer = self.sandbox.ask(self._request("render", seconds, variables=variables_json))
        return str(answer["text"])

    def encode(self, messages: Sequence[Message], tools: Tools, lead: str, mark: str) -> list[int]:
        """Render messages and encode the text with the tokenizer of the same process.

        Args:
            lead: prefix that is added if the text does not start with it.
            mark: character that splits the text into pieces; removed, and the pieces are encoded
                separately.
        """
        variables_json = self._write(messages, tools)
        request = self._request(
            "encode_rendered",
            _RENDERING_S_PER_CHARACTER * len(variables_json),
            variables=variables_json,
            failure=f"{_FAILED}, or the tokenizer",
            lead=lead,
            mark=mark,
            base_s=DEFAULT_SECONDS,
            encoding_s=ENCODING_S_PER_CHARACTER,
            expected_characters=len(variables_json) + len(self.source),
        )
        return all_ids_from_bytes(self.sandbox.ask(request)["payload"])

    def _write(self, messages: Sequence[Message], tools: Tools) -> str:
        """Return the template's variables as JSON."""
        if tools and not _TOOLS.search(self.source):
            raise UsageError(
                "template-without-tools",
                "the model's template has no tools",
                remedy="describe them in a message, or take a model that was trained to call them",
            )
        variables: dict[str, Any] = {"tools": tools or None, "documents": None, **self.tokens}
        variables |= {"messages": messages, "add_generation_prompt": True}

        try:
            return _write_json(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                "messages-not-json",
                f"messages and template variables must be JSON: {error}",
                remedy="give texts, numbers, lists and dicts",
            ) from error

    def _request(
        self, op: str, more_seconds: float, failure: str = _FAILED, **values: Any
    ) -> SandboxRequest:
        return SandboxRequest(
            op,
            {"template": self._name, **values},
            code="template-failed",
            failure=failure,
            remedy="shorten the messages, or compare them with the model card; if they are right, "
            "correct the template",
            seconds=DEFAULT_SECONDS + more_seconds,
        )


class PromptEncoder:
    """A tokenizer with its chat template.

    ``lead`` is the beginning-of-sequence token if every prompt must start with it, else empty; it
    is added where the template does not write it.
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
        """Load tokenizer and template of a model folder or bundle."""
        encoder = cls.start_loading(folder)
        encoder.check()
        return encoder

    @classmethod
    def start_loading(cls, folder: Path) -> PromptEncoder:
        """Start loading without waiting; :meth:`check` or the first use waits."""
        files = TokenizerFiles(folder)
        source = files.chat_template
        bos_token = files.special_token("bos_token")
        eos_token = files.special_token("eos_token")

        tokenizer = Tokenizer(files.file)
        template = ChatTemplate(source, bos_token, eos_token, sandbox=tokenizer.sandbox)
        tokenizer.sandbox.start()
        return cls(tokenizer, template, add_bos=files.config.get("add_bos_token") is True)

    def check(self) -> None:
        """Wait until tokenizer and template are loaded; raise ArtifactError if one is invalid."""
        self.tokenizer.check()

    def with_template(self, source: str) -> PromptEncoder:
        """Return an encoder with the same tokenizer and another template."""
        encoder = copy.copy(self)
        sandbox = self.tokenizer.sandbox
        encoder.template = ChatTemplate(source, **self.template.tokens, sandbox=sandbox)
        return encoder

    def render(self, prompt: Prompt, tools: Tools = ()) -> str:
        """Return the prompt text of a conversation."""
        text = self.template.render(list_messages(prompt), tools)
        return text if text.startswith(self.lead) else self.lead + text

    def encode(self, prompt: Prompt, tools: Tools = ()) -> list[int]:
        """Return the prompt ids of a conversation; see :meth:`ChatTemplate.render`.

        A control token that a user typed, such as ``<|im_end|>``, or that is in a tool, is encoded
        as text and cannot end a turn. In the model's own messages and in the template's text it is
        the token.
        """
        messages = list_messages(prompt)
        texts = [str(message.get("content")) for message in messages if not _is_by_model(message)]
        texts.append(str(tools))
        forged = [token for token in self.tokenizer.control_tokens if _is_in_any(token, texts)]

        mark = ""
        if forged:
            mark = next(mark for mark in _MARKS if not _is_in_any(mark, texts))
            messages = [_mark_message(message, forged, mark) for message in messages]
            tools = _insert_marks(tools, forged, mark)
        return self._encode_marked(messages, tools, mark)

    def _encode_marked(self, messages: Sequence[Message], tools: Tools, mark: str) -> list[int]:
        return self.template.encode(messages, tools, self.lead, mark)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in it are parsed, none are added."""
        return self.tokenizer.encode(text)

    @property
    def leading_ids(self) -> list[int]:
        """Ids that begin every text of the model, as its beginning-of-sequence; empty without."""
        return [*self.tokenizer.leading_ids] or self.encode_text(self.lead)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with special tokens written out."""
        return self.tokenizer.decode(ids)


def list_messages(prompt: Prompt) -> Sequence[Message]:
    """Return the messages of a prompt; a string is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _is_in_any(piece: str, texts: Iterable[str]) -> bool:
    return any(piece in text for text in texts)


def _is_by_model(message: Message) -> bool:
    return message.get("role") == "assistant"


def _mark_message(message: Message, forged: Sequence[str], mark: str) -> Message:
    """Split each control token in a message by a mark, so that its halves are plain text."""
    if _is_by_model(message):
        return message
    return {**message, "content": _insert_marks(message.get("content"), forged, mark)}


def _insert_marks(content: Any, forged: Sequence[str], mark: str) -> Any:
    if isinstance(content, str):
        for token in forged:
            content = content.replace(token, token[:1] + mark + token[1:])
        return content

    if isinstance(content, Mapping):  # a part of a message, as {"type": "text", "text": …}
        return {
            _insert_marks(key, forged, mark): _insert_marks(value, forged, mark)
            for key, value in content.items()
        }
    if isinstance(content, Sequence):
        return [_insert_marks(part, forged, mark) for part in content]
    return content


def _to_json_type(value: object) -> object:
    """Convert a mapping or sequence that JSON does not know to a dict or list."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_write_json = json.JSONEncoder(default=_to_json_type).encode

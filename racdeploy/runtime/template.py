"""Turn messages into prompt ids: the model's chat template, in a sandbox, then its tokenizer.

A template is code from a stranger: it runs without access to Python's internals, for a bounded
time. Rendering equals transformers' ``apply_chat_template``; the tokenizer adds nothing.
Source: transformers 4.57 ``utils/chat_template_utils.py``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from racdeploy.errors import ArtifactError
from racdeploy.models.tokenizer_files import TokenizerFiles, read_tokenizer

Message = Mapping[str, Any]

# A template of real models renders in milliseconds, to texts of at most megabytes.
_SECONDS = 5.0
_LARGEST_NUMBER = 1_000_000  # that a function or filter is called with
_LARGEST_TEXT = 16_000_000
_MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
_FAILURES = (TemplateError, MemoryError, RecursionError, TimeoutError, *_MISTAKES)


class _Generation(Extension):
    """Render the body of ``{% generation %}``, which marks text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Code(CodeGenerator):
    """Compile ``~`` to a call that can refuse; jinja2's sandbox lets it through."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which also refuses operations whose result would fill the memory."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _bound(function) for name, function in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = _size(left) + _size(right)

        if operator == "*" and isinstance(left, Sized) != isinstance(right, Sized):
            number = right if isinstance(left, Sized) else left
            size *= int(number)
        elif operator == "**":
            # x ** n has n times the bits of x. Bits are counted here, not words: the digits of
            # such a number take time that grows with their square.
            size = 64 * _size(left) * abs(int(right))

        if size > _LARGEST_TEXT:
            raise SecurityError(f"{operator!r} would make a value of size {size}")

        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_large_numbers(*args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)

    def join(self, parts: Sequence[Any]) -> str:
        texts = [str(part) for part in parts]
        length = sum(map(len, texts))
        if length > _LARGEST_TEXT:
            raise SecurityError(f"'~' would make a text of {length} characters")
        return "".join(texts)


class ChatTemplate:
    """A compiled chat template; a token that is None is undefined in it."""

    def __init__(
        self, source: str, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        self.source = source
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self.tokens = {name: text for name, text in named.items() if text is not None}

        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )

        environment.filters["tojson"] = _bound(_to_json)
        environment.globals.pop("lipsum")  # writes as much text as it is asked for
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

        with _template_errors():
            self._template = environment.from_string(source)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the prompt text; ``variables`` are the template's own, as ``enable_thinking``."""
        values = {"tools": None, "documents": None, **self.tokens, **variables}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}

        pieces = []
        length = 0

        with _template_errors(), _deadline(_SECONDS):
            for piece in self._template.generate(**values):
                pieces.append(piece)
                length += len(piece)
                if length > _LARGEST_TEXT:
                    raise SecurityError(f"more than {_LARGEST_TEXT} characters of output")

        return "".join(pieces)


class PromptEncoder:
    """A tokenizer with its chat template.

    ``lead`` is what every prompt begins with, also where the template does not write it: the
    beginning-of-sequence token, or nothing.
    """

    def __init__(
        self, tokenizer_file: Path, template: ChatTemplate, *, add_bos: bool = False
    ) -> None:
        self.tokenizer = read_tokenizer(tokenizer_file)
        self.template = template
        self.bos_token = template.tokens.get("bos_token", "")
        self.lead = self.bos_token if add_bos else ""

    @classmethod
    def from_folder(cls, folder: Path) -> PromptEncoder:
        """Read the tokenizer and the template of a model folder or a bundle."""
        files = TokenizerFiles(folder)
        bos_token = files.special_token("bos_token")
        eos_token = files.special_token("eos_token")
        template = ChatTemplate(files.chat_template, bos_token, eos_token)
        return cls(files.file, template, add_bos=files.config.get("add_bos_token") is True)

    def with_template(self, source: str) -> PromptEncoder:
        """Return an encoder of the same tokenizer with another template."""
        other = copy.copy(self)
        other.template = ChatTemplate(source, **self.template.tokens)
        return other

    def render(self, prompt: str | Sequence[Message], **variables: Any) -> str:
        """Return the prompt text of a conversation; a plain string is one message of the user."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.template.render(messages, **variables)
        return text if text.startswith(self.lead) else self.lead + text

    def encode(self, prompt: str | Sequence[Message], **variables: Any) -> list[int]:
        """Return the prompt ids of a conversation; see :meth:`ChatTemplate.render`."""
        return self.encode_text(self.render(prompt, **variables))

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text as it is: special tokens written in it count, none are added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens written out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def _size(value: object) -> int:
    """Return the items of a container, the 64-bit words of a number, 1 for anything else."""
    if isinstance(value, Sized):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 64 + 1
    return 1


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses large numbers; what marks it for jinja2 is copied along."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _refuse_large_numbers(*args[1:], *kwargs.values())
        return function(*args, **kwargs)

    return bounded


def _refuse_large_numbers(*values: object) -> None:
    for value in values:
        if isinstance(value, int) and value > _LARGEST_NUMBER:
            raise SecurityError(f"a call with the number {value}")


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise ArtifactError(
            f"the chat template failed: {type(error).__name__}: {error}",
            remedy="compare the messages with the model card; if they are right, correct the "
            "template",
        ) from error


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Stop the body's Python code after some time; a template can loop without calling ours."""
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"still rendering after {seconds:.0f} s")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)

    try:
        yield
    finally:
        sys.settrace(previous)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON; jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

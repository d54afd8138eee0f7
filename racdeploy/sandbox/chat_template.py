"""Compile and render chat templates in jinja2's sandbox, without access to Python's internals.

The process that this runs in limits time and memory. Rendering equals transformers'
``apply_chat_template``.
Source: transformers 4.57 ``utils/chat_template_utils.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from importlib import import_module
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT_CHARACTERS = (
    16_000_000  # templates of real models render to a few million characters at most
)

# Filters and methods import these lazily, and this process cannot open files later.
_LAZY = (
    "encodings.ascii encodings.idna encodings.punycode encodings.unicode_escape encodings.utf_16"
)
for _name in (*_LAZY.split(), "html", "html.entities", "jinja2.debug", "pprint", "textwrap"):
    import_module(_name)
time.localtime()  # so that the C library reads the time zone now


class _Generation(Extension):
    """Render the body of ``{% generation %}``, which marks text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> Template:
    """Compile a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )

    environment.filters["tojson"] = _to_json
    environment.globals.pop("lipsum")  # it generates text of any length
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(source)


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Return the rendered text; SecurityError where it is too long."""
    chunks = []
    length = 0

    for chunk in template.generate(**variables):
        chunks.append(chunk)
        length += len(chunk)
        if length > MAX_TEXT_CHARACTERS:
            raise SecurityError(f"more than {MAX_TEXT_CHARACTERS} characters of output")

    return "".join(chunks)


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

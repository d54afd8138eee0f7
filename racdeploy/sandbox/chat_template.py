"""Chat templates, compiled and rendered in jinja2's sandbox: no access to Python's internals.

What a template takes in time and memory is bounded by the process that this runs in. Rendering
equals transformers' ``apply_chat_template``.
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

LARGEST_TEXT = 16_000_000  # characters; a template of real models renders to a few millions at most

# jinja2 imports them late, and this process opens no files later.
for _name in ("encodings.ascii", "encodings.unicode_escape", "jinja2.debug", "pprint", "textwrap"):
    import_module(_name)
time.localtime()  # as the C library reads the time zone


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
    environment.globals.pop("lipsum")  # writes as much text as it is asked for
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(source)


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Return the text of a template."""
    pieces = []
    length = 0

    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > LARGEST_TEXT:
            raise SecurityError(f"more than {LARGEST_TEXT} characters of output")

    return "".join(pieces)


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

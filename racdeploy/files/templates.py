"""Plain texts from jinja templates that lie beside the modules which use them."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined


def render_text(package: str, name: str, **values: object) -> str:
    """Return the text of a template of a package; a value that is not given is an error."""
    environment = Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    source = (files(package) / name).read_text(encoding="utf-8")
    return environment.from_string(source).render(values)

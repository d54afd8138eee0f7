"""Render plain texts from jinja templates in racdeploy's packages."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined


def render_text(package: str, name: str, **values: object) -> str:
    """Return the rendered template of a package; a missing value is an error."""
    environment = Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    source = (files(package) / name).read_text(encoding="utf-8")
    return environment.from_string(source).render(values)

"""Section of a recipe, and types and limits that sections share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from racdeploy import plugins

# A downloaded bundle contains a recipe: bound every number, so that it cannot exhaust the machine.
MAX_PROMPTS = 1_000_000
MAX_SAMPLES = 256
MAX_SECONDS = 1e6
BatchSize = Annotated[int, Field(ge=1, le=1024)]


class Section(BaseModel):
    """Part of a recipe: immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values; pydantic takes any key, and would change nothing."""
        unknown = {*(update or {})} - type(self).model_fields.keys()
        assert not unknown, f"{type(self).__name__} has no {', '.join(sorted(unknown))}"
        return super().model_copy(update=update, deep=deep)


def check_plugin(kind: str, noun: str, name: str) -> str:
    """Return the name of a plugin; ValueError, with the nearest names, for an unknown one."""
    known = plugins.list_names(kind)
    if name not in known:
        nearest = plugins.suggest(name, known)
        raise ValueError(f"unknown {noun} {name!r}{nearest}; known: {', '.join(known)}")
    return name


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


Regex = Annotated[str, AfterValidator(_check_regex)]

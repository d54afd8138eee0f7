"""What a search's own recipe says beside its candidates, so that a build can be asked for the same.

A candidate is what it changes of that recipe: both together are options of ``racdeploy build``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from racdeploy.recipe import Recipe
from racdeploy.storage.toml import merge
from racdeploy.tune.candidates import PLAIN

_PLACES = {"model", "target", "tune"}
"""What a command names by itself, or does not need."""


def list_asked(recipe: Recipe) -> dict[str, Any]:
    """Return the keys in which a search's recipe differs from what a bare build would take."""
    bare = Recipe.combine(None, merge({"model": recipe.model, "target": recipe.target}, PLAIN))
    asked = recipe.unpruned().changed(PLAIN)

    found = _list_changed(asked.model_dump(mode="json"), bare.model_dump(mode="json"), asked)
    return {part: values for part, values in found.items() if part not in _PLACES}


def _list_changed(
    values: Mapping[str, Any], usual: Mapping[str, Any], model: BaseModel
) -> dict[str, Any]:
    """Return the values that are not as usual; tables of a user's own are kept whole."""
    changed = {}

    for key, value in values.items():
        part = getattr(model, key)
        if value == usual[key]:
            continue
        if isinstance(part, BaseModel):
            changed[key] = _list_changed(value, usual[key], part)
        else:
            changed[key] = value

    return changed

"""Cases of a test, as families: some in every run, all of them with ``make test-more``."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

import pytest

KINDS = ("qwen3", "qwen3_moe", "gemma3_text", "granitemoehybrid", "phi3")
"""Families that stand for what others are, too: plain, of experts, with windows, with a state, and
with parts of a block in one tensor."""


def some(names: Iterable[Hashable], kept: Collection[Hashable] = KINDS) -> list[Any]:
    """Return values of one argument: those that are kept, and mark the others."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.more) for name in names]


def some_cases(cases: Mapping[str, Mapping[str, Any]], kept: Collection[str]) -> list[Any]:
    """Return the names of cases with a ``family``; ``-k FAMILY`` selects all cases of one."""
    parameters = []
    for name, case in cases.items():
        marks = () if name in kept else pytest.mark.more
        parameters.append(pytest.param(name, id=f"{case['family']}: {name}", marks=marks))
    return parameters


def selected(request: pytest.FixtureRequest, argument: str) -> list[str]:
    """Return the values of an argument that tests of the fixture's module will be called with."""
    values = {}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if item.path == request.path and argument in parameters:
            values[parameters[argument]] = None
    return list(values)

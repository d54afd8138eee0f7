"""Items of reasoning-gym's generators: a specification, a seed and an index give one item.

A specification is ``NAME`` or ``NAME:KEY=VALUE:…``, with the parameters of the generator's config,
and ``task_indices`` where it draws from numbered templates. Item ``index`` is that of
``reasoning_gym.create_dataset(NAME, seed=seed, size=CHUNK_ITEMS)[index]``.
Source: reasoning-gym 0.1.25.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from racdeploy import plugins
from racdeploy.errors import UsageError

CHUNK_ITEMS = 1000
"""Items of a seed; the next ones have a seed that is larger by as many."""
_OWN_FIELDS = ("seed", "size")
_TEMPLATES = "task_indices"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class GeneratorSpec:
    """A generator and its parameters, as text."""

    name: str
    parameters: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> GeneratorSpec:
        """Return the specification in ``NAME:KEY=VALUE:…``.

        Raises:
            UsageError: a parameter has no value.
        """
        name, *rest = text.split(":")
        parameters = []
        for each in rest:
            key, sign, value = each.partition("=")
            if not (key and sign and value):
                raise UsageError(
                    "generator-parameter",
                    f"{each!r} is no parameter of a generator",
                    remedy=f"write gym:{name}:KEY=VALUE",
                )
            parameters.append((key, value))
        return cls(name, tuple(parameters))

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{key}={value}" for key, value in self.parameters)])


@lru_cache(maxsize=8)
def open_dataset(spec: GeneratorSpec, seed: int) -> Any:
    """Return reasoning-gym's dataset of one seed.

    Raises:
        UsageError: the generator or one of its parameters is unknown or impossible.
    """
    plugins.require_package("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    if spec.name not in DATASETS:
        raise UsageError(
            "unknown-generator",
            f"reasoning-gym has no generator {spec.name!r}{plugins.suggest(spec.name, DATASETS)}",
            remedy=f"known: {', '.join(sorted(DATASETS))}",
        )

    make, config = DATASETS[spec.name]
    values = _read_parameters(spec, config)
    try:
        with redirect_stdout(io.StringIO()):  # a few generators print dots
            dataset = make(config=config(**values, seed=seed, size=CHUNK_ITEMS))
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            "generator-refuses",
            f"reasoning-gym's {spec.name} refuses {dict(spec.parameters)}: {error}",
            remedy="leave the parameters out, or see its config in reasoning-gym",
        ) from error

    _choose_templates(dataset, spec, seed)
    return dataset


def make_item(spec: GeneratorSpec, seed: int, index: int) -> Mapping[str, Any]:
    """Return one item: ``question``, ``answer`` and ``metadata``.

    Raises:
        UsageError: see :func:`open_dataset`; or the generator makes no text.
    """
    dataset = open_dataset(spec, seed)
    with redirect_stdout(io.StringIO()):
        item: Mapping[str, Any] = dataset[index]

    question, answer = item.get("question"), item.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str | None):
        raise UsageError(
            "generator-without-text",
            f"reasoning-gym's {spec.name} makes no questions in text",
            remedy="choose another generator",
        )
    return item


def _read_parameters(spec: GeneratorSpec, config: type) -> dict[str, Any]:
    """Return the values of a specification for a generator's config, without the templates."""
    known = [field.name for field in dataclasses.fields(config)]
    values = {}
    for key, text in spec.parameters:
        if key == _TEMPLATES:
            continue
        if key not in known or key in _OWN_FIELDS:
            raise _refuse_parameter(spec, key, known)
        values[key] = _read_value(text)
    return values


def _choose_templates(dataset: Any, spec: GeneratorSpec, seed: int) -> None:
    """Let a dataset draw from the numbered templates that the specification gives."""
    given = dict(spec.parameters).get(_TEMPLATES)
    if given is None:
        return

    drawn = getattr(dataset, _TEMPLATES, None)
    if not (isinstance(drawn, list) and all(isinstance(each, int) for each in drawn)):
        raise _refuse_parameter(spec, _TEMPLATES, [])

    known = set(getattr(dataset, "generators", ()))
    chosen = _read_numbers(given)
    if not chosen or not known.issuperset(chosen):
        raise UsageError(
            "unknown-template",
            f"{spec.name} has no templates {given!r}; it has {min(known)} to {max(known)}",
            remedy=f"write {_TEMPLATES}=0-39, or {_TEMPLATES}=1,5,7",
        )

    # Some templates of gsm_symbolic are known to be wrong, and its own draws leave them out.
    usable = set(getattr(sys.modules[type(dataset).__module__], "tasks_ok", known))
    chosen = [template for template in chosen if template in usable]
    if not chosen:
        raise UsageError(
            "unknown-template",
            f"reasoning-gym draws none of the templates {given!r} of {spec.name}",
            remedy="name others",
        )
    setattr(dataset, _TEMPLATES, Random(seed).choices(chosen, k=CHUNK_ITEMS))


def _read_value(text: str) -> Any:
    """Return the number, truth value or list in a text, or else the text itself."""
    if "," in text:
        return [_read_value(part) for part in text.split(",") if part]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_numbers(text: str) -> list[int]:
    """Return the numbers in ``1,5,7-9``; empty if it is something else."""
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            return []
        first, last = match[1], match[2] or match[1]
        numbers += range(int(first), int(last) + 1)
    return numbers


def _refuse_parameter(spec: GeneratorSpec, key: str, known: list[str]) -> UsageError:
    others = [name for name in known if name not in _OWN_FIELDS]
    return UsageError(
        "generator-parameter",
        f"reasoning-gym's {spec.name} has no parameter {key!r}{plugins.suggest(key, others)}",
        remedy=f"it has: {', '.join(others) or 'none'}",
    )

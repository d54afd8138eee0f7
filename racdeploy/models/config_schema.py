"""The schema of ``config.json``: type and bounds of every key in ``config_schema.toml``.

Bounds are far above those of existing models; without them a hostile file of one line would make
loops and tables of any length. A key with the value None counts as missing. A key that only one
family has need not be in the file: it has the type of the family's default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from racdeploy.errors import ModelError

Config = Mapping[str, Any]
"""Settings as ``config.json`` has them."""
_MAX_LISTED = 4096
_MAX_COUNT = 1 << 20
_MAX_BLOCKS = 4096
_MAX_FEED_FORWARD = 1 << 24
_MAX_TOKENS = 1 << 24
_MAX_NUMBER = 1e12
_KEYS = tomllib.loads(
    (files("racdeploy.models") / "config_schema.toml").read_text(encoding="utf-8")
)

Kind = tuple[TypeAdapter[Any], str]
"""The type of a value, and its name for messages."""


def check_config(config: Config, where: str, listed: Collection[str] = ()) -> None:
    """Raise ModelError for the first key of another type, or out of its bounds.

    Args:
        listed: keys that may have one value for each block.
    """
    for key, kind in _KINDS.items():
        value = config.get(key)
        if key in listed and isinstance(value, list):
            for each in value[:_MAX_LISTED]:
                _check_value(key, each, kind, where)
        else:
            _check_value(key, value, kind, where)


def check_family_keys(config: Config, defaults: Config, where: str) -> None:
    """Raise ModelError for a key that the schema lacks and whose value is unlike the default."""
    for key in defaults.keys() - CHECKED_KEYS:
        kind = _KINDS_BY_DEFAULT.get(type(defaults[key]))
        if kind:
            _check_value(key, config.get(key), kind, where)


def _check_value(key: str, value: object, kind: Kind, where: str) -> None:
    adapter, name = kind
    if value is not None and not _fits(adapter, value):
        raise ModelError(
            "damaged-config",
            f"{where}: {key} is {str(value)[:80]!r}, not {name}",
            remedy="compare the file with the one that the model's authors publish",
        )


def _fits(kind: TypeAdapter[Any], value: object) -> bool:
    try:
        kind.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _count(minimum: int, maximum: int) -> Kind:
    count = Annotated[int, Field(ge=minimum, le=maximum)]
    return TypeAdapter(count), f"a whole number from {minimum} to {maximum:,}"


_Number = Annotated[float, Field(ge=-_MAX_NUMBER, le=_MAX_NUMBER, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=200)]
_Single = _Number | bool | str | None
_List = Annotated[list[_Single], Field(max_length=_MAX_LISTED)]
_Plain = _Single | _List
_Table = dict[str, _Plain | dict[str, _Plain]]  # one table for each kind of attention
_TokenId = Annotated[int, Field(ge=-1, lt=_MAX_TOKENS)]
_TokenIds = _TokenId | Annotated[list[_TokenId], Field(max_length=_MAX_LISTED)]
_Block = Annotated[str, Field(pattern=r"^\d{1,5}$")]
_BlockCounts = dict[str, Annotated[int, Field(ge=1, le=_MAX_FEED_FORWARD)]]
_ByBlock = Annotated[dict[_Block, _BlockCounts], Field(max_length=_MAX_BLOCKS)]
_TYPES: Mapping[str, tuple[Any, str]] = {
    "numbers": (_Number, "a finite number"),
    "switches": (bool, "true or false"),
    "texts": (_Text, "a short text"),
    "lists": (_List, f"a list of at most {_MAX_LISTED:,} texts or numbers"),
    "tables": (_Table, "a table of numbers, texts and lists of them"),
    "token_ids": (_TokenIds, "token ids"),
    "switches_or_texts": (bool | _Text, "true, false or a short text"),
    "blocks": (_ByBlock, "a table of blocks, each a table of counts"),
}

_KINDS: Mapping[str, Kind] = {
    **{
        key: _count(counts["minimum"], counts["maximum"])
        for counts in _KEYS["counts"]
        for key in counts["keys"]
    },
    **{
        key: (TypeAdapter(kind), name)
        for section, (kind, name) in _TYPES.items()
        for key in _KEYS[section]
    },
}
_KINDS_BY_DEFAULT: Mapping[type, Kind] = {
    bool: (TypeAdapter(bool), "true or false"),
    int: _count(0, _MAX_COUNT),
    float: (TypeAdapter(_Number), "a finite number"),
    str: (TypeAdapter(_Text), "a short text"),
    list: (TypeAdapter(_List), f"a list of at most {_MAX_LISTED:,} texts or numbers"),
    dict: (TypeAdapter(_Table), "a table of numbers, texts and lists of them"),
}
CHECKED_KEYS = frozenset(_KINDS)
"""Keys that racdeploy reads."""

"""Writer of TOML for nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w

from racdeploy.files.unprintable import replace_unprintable


def to_toml(settings: Mapping[str, Any]) -> str:
    """Return the settings as a TOML document, without None, for which TOML has no value."""
    return tomli_w.dumps(_clean(settings))


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {replace_unprintable(str(k)): _clean(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value if item is not None]
    return value if isinstance(value, int | float) else replace_unprintable(str(value))

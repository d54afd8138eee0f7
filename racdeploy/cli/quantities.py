"""Sizes and durations as text: 1.5GB, 90m."""

from __future__ import annotations

import re

from racdeploy.errors import UsageError

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kMG]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def read_size(text: str | None, option: str) -> int | None:
    """Return the bytes of a size as 1.5GB, 300MiB or 2000."""
    if text is None:
        return None

    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(
            "not-a-size", f"{option} {text} is not a size", remedy=f"as {option} 1.5GB"
        )

    binary = 1024 / 1000 if "i" in text.lower() else 1
    unit = match["unit"].lower()
    power = "kmg".find(unit) + 1 if unit else 0
    return int(float(match["number"]) * _UNITS[unit] * binary**power)


def read_duration(text: str | None) -> float | None:
    """Return the seconds of a duration as 90m, 2h or 30; without a unit it is in seconds."""
    if text is None:
        return None

    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise UsageError(
            "not-a-time", f"--budget {text} is not a time", remedy="as --budget 90m, or 2h"
        )
    return float(match["number"]) * _SECONDS[match["unit"]]

"""Formatting of the numbers of a report."""

import math

_MAX_PERCENT = 0.995  # rounds to 100 % above


def format_points(fraction: float) -> str:
    """Return a fraction in percentage points with one decimal and a true minus sign."""
    # "-0.0" comes first: a loss that rounds to nothing must not look like one.
    return f"{100 * fraction:.1f}".replace("-0.0", "0.0").replace("-", "−")


def format_confidence(confidence: float) -> str:
    """Return a confidence in percent, with as many digits as tell it from certainty."""
    if confidence < _MAX_PERCENT:
        return f"{confidence:.0%}"
    digits = math.ceil(-math.log10(1 - confidence)) - 2
    return f"{confidence:.{digits}%}"

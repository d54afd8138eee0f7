"""Formatting of the numbers of a report."""


def format_points(fraction: float) -> str:
    """Return a fraction in percentage points with one decimal and a true minus sign."""
    # "-0.0" comes first: a loss that rounds to nothing must not look like one.
    return f"{100 * fraction:.1f}".replace("-0.0", "0.0").replace("-", "−")

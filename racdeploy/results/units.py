"""How numbers of a report are written."""


def points(fraction: float) -> str:
    """Return a fraction in points of a hundred, with a true minus sign."""
    return f"{100 * fraction:.1f}".replace("-0.0", "0.0").replace("-", "−")

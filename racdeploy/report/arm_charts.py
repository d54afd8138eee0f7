"""Sizes on an axis."""

from racdeploy.report.tables import readable_bytes


def bytes_text(value: float) -> str:
    """Return a size as the ticks of an axis have it."""
    return readable_bytes(round(value))

"""How many prompts a verdict needs: the inverse of the power, searched for."""

from __future__ import annotations

from racdeploy.verification.stats.paired import MAX_PROMPTS, power


def required_n(
    discordant_rate: float,
    margin: float,
    confidence: float = 0.90,
    drop: float = 0.0,
    target_power: float = 0.8,
) -> int:
    """Return how many prompts make "pass" as likely as ``target_power``.

    Counts are whole, so power climbs in a saw-tooth; this is a crossing of it, and a few prompts
    more may fall a little below.

    Raises:
        ValueError: the drop is not below the margin, or more than a million prompts would be
            needed.
    """
    if not 0 < target_power < 1:
        raise ValueError(f"target_power is {target_power}; it lies between 0 and 1")
    if not drop < margin:
        raise ValueError(
            f"a true drop of {drop} is not below the margin of {margin}: no n is enough"
        )

    high = 1
    while power(high, discordant_rate, margin, confidence, drop) < target_power:
        if high == MAX_PROMPTS:
            raise ValueError(
                f"more than {MAX_PROMPTS} prompts would be needed for a margin of {margin}"
            )
        high = min(2 * high, MAX_PROMPTS)

    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if power(middle, discordant_rate, margin, confidence, drop) < target_power:
            low = middle
        else:
            high = middle
    return high

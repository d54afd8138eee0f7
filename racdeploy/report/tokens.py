"""Strings that the engine tokenizes differently, as accepted: what the check counted."""

from __future__ import annotations

from racdeploy.report.model import Report


def describe_token_differences(report: Report) -> str:
    """Return how many strings differ, one sentence; empty where none does, or the check failed."""
    checks = {check.name: check for check in report.checks}
    found = checks.get("tokens")
    if found is None or found.verdict != "pass" or not found.figures.get("different"):
        return ""

    figures = found.figures
    counted = f"{figures['different']:,} of {figures['strings']:,} hard strings"
    return (
        f"The artifact's engine tokenizes {counted} ({figures['share']:.3%}) differently from "
        f"tokenizer.json, up to {figures['accepted']:.3%} is accepted; one is {figures['example']}."
    )

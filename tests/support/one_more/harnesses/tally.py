"""Tally: a harness that writes one file, ``tally.json``, with a figure of each document."""

from __future__ import annotations

from pathlib import Path

from racdeploy.files.reading import read_json
from racdeploy.harnesses import HarnessRequest, HarnessScore, find_results

PACKAGE = "tally"
INSTALL = "tally"


def arguments(order: HarnessRequest) -> list[str]:
    """Return what it takes."""
    limit = ["--limit", str(order.settings.limit)] if order.settings.limit else []
    asked = [order.url, order.model, *order.settings.tasks, str(order.settings.max_new_tokens)]
    return ["tally", *asked, *limit, "--out", str(order.out)]


def read(out: Path, python: Path) -> list[HarnessScore]:
    """Return one score for each task."""
    file, _ = find_results(out, "tally.json")

    scores = []
    for task, figures in read_json(file).items():
        value = sum(figures.values()) / len(figures)
        scores.append(HarnessScore(task, "right", value, len(figures), by_document=figures))
    return scores

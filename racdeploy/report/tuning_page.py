"""The page of a search for the best model: who wins, the front in pictures, every candidate.

As the page of a report: one file that fetches nothing, and all text in it is hostile.
"""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report import tuning_charts
from racdeploy.report.page import render_page
from racdeploy.report.tables import Table, plain, readable_bytes, say, speed_text
from racdeploy.report.tuning import Candidate, Tuning
from racdeploy.report.tuning_tables import (
    ANSWERED,
    OTHERS,
    STAGES,
    WISHES,
    describe_device,
    keeps_wishes,
    seconds_text,
    share_text,
    tuning_tables,
    write_build,
)

_ROWS = 400
_BUILDS = 60
_TITLES = {
    "asked": WISHES,
    "front": "The front",
    "candidates": "Candidates",
    "search": "How it was searched",
    "again": "Build one of them",
}
_GAIN = "{:points} points ({:points} to {:points})"

_Figure = tuple[str, str]
"""A figure and what is said below it."""


@dataclass(frozen=True)
class _Tile:
    """A figure of the winner, beside that of the best of the other kind."""

    name: str
    rival: str
    winner: str
    note: str = ""


def render(tuning: Tuning) -> str:
    """Return the page."""
    by_title = {table.title: table for table in tuning_tables(tuning)}
    charts = {
        "size_chart": tuning_charts.accuracy_over_size(tuning),
        "speed_chart": tuning_charts.accuracy_over_speed(tuning),
        "seconds_chart": tuning_charts.seconds_over_size(tuning),
    }

    winner, rival = tuning.find(tuning.winner), tuning.find(tuning.rival)
    assert winner, "the data model has checked that"
    commands = [(plain(each.name), write_build(tuning, each)) for each in tuning.candidates]

    values = {
        **charts,
        "left_out": tuning_charts.describe_left_out(tuning),
        "tuning": tuning,
        "is_kept": keeps_wishes(tuning),
        "device": describe_device(tuning.device),
        "facts": _list_facts(tuning, winner),
        "command": write_build(tuning, winner),
        "tiles": _list_tiles(winner, rival),
        "tables": by_title,
        "sections": _list_sections(by_title, any(charts.values())),
        "others": OTHERS,
        "answered": ANSWERED,
        "stages": STAGES,
        "wishes": WISHES,
        "commands": commands[:_BUILDS],
        "command_count": len(commands),
        "row_limit": _ROWS,
        "source": "tune.json",
    }
    return render_page("tune.html.jinja", values)


def _list_sections(by_title: dict[str, Table], has_charts: bool) -> dict[str, str]:
    """Return the title of each part that has something to show, by its place in the page."""
    shown = {
        "asked": True,
        "front": has_charts,
        "candidates": ANSWERED in by_title or OTHERS in by_title,
        "search": True,
        "again": True,
    }
    return {place: title for place, title in _TITLES.items() if shown[place]}


def _list_facts(tuning: Tuning, winner: Candidate) -> list[tuple[str, str]]:
    """Return what a reader has to know of the search, in a few words each."""
    beside = f"{tuning.rival}, on the same prompts" if tuning.rival else ""
    facts = {
        "Device": describe_device(tuning.device),
        "Winner": winner.name,
        "Beside it": beside,
        "Gain in accuracy": _say_gain(tuning),
        "Tasks": ", ".join(tuning.tasks),
        "Candidates": f"{len(tuning.candidates):,}",
        "Bundle": tuning.bundle,
    }
    return [(name, plain(text)) for name, text in facts.items() if text]


def _say_gain(tuning: Tuning) -> str:
    gain = tuning.gain
    if gain is None:
        return ""
    return f"{say(_GAIN, gain.value, gain.lower, gain.upper)}, 90% interval, paired"


def _list_tiles(winner: Candidate, rival: Candidate | None) -> list[_Tile]:
    """Return the figures that the winner has."""
    figures = {
        "Right answers": _say_accuracy,
        "Seconds for each right answer": _say_seconds,
        "Size": _say_size,
        "Tokens/s": _say_speed,
    }

    tiles = []
    for name, write in figures.items():
        found = write(winner)
        before = write(rival) if rival else None
        if found:
            tiles.append(_Tile(name, before[0] if before else "", *found))
    return tiles


def _say_accuracy(each: Candidate) -> _Figure | None:
    found = each.accuracy
    if found is None:
        return None
    ends = f"{share_text(found.lower)} to {share_text(found.upper)}"
    return share_text(found.value), f"{ends} of {each.prompts:,} prompts"


def _say_seconds(each: Candidate) -> _Figure | None:
    found = each.seconds_per_correct
    if found is None:
        return None
    ends = f"{seconds_text(found.lower)} to {seconds_text(found.upper)}"
    return f"{seconds_text(found.value)} s", f"{ends}, predicted for the device"


def _say_size(each: Candidate) -> _Figure | None:
    note = f"{each.size_bytes:,} bytes" + ("" if each.size_measured else ", predicted")
    return readable_bytes(each.size_bytes), note


def _say_speed(each: Candidate) -> _Figure | None:
    if each.tokens_per_s is None:
        return None
    return speed_text(each.tokens_per_s), "predicted for the device"

"""The page, table and picture of a search: text stays text, and what they say was found."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from racdeploy.files.toml import read_toml
from racdeploy.report.terminal import print_tuning
from racdeploy.report.tuning_files import (
    FILE,
    PAGE,
    RECIPE,
    read_tuning,
    write_tuning,
)
from racdeploy.report.tuning_page import draw_accuracy, render
from racdeploy.report.tuning_tables import (
    describe_device,
    list_facts,
    make_tuning_table,
    meets_limits,
)
from racdeploy.results.tuning import Candidate, CostEstimate, Tuning
from tests.support.elements import Elements
from tests.support.errors import raises
from tests.support.sample_report import HOSTILE
from tests.support.sample_tuning import build_tuning


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    return build_tuning()


@pytest.fixture(scope="module")
def page(tuning: Tuning) -> str:
    return render(tuning)


def spoil(tuning: Tuning) -> Tuning:
    """Return a search whose every text is from somebody who means harm."""
    given = {HOSTILE: HOSTILE, "export.tensors": {HOSTILE: HOSTILE}}
    first = tuning.candidates[0].model_copy(
        update={"name": HOSTILE, "reason": HOSTILE, "settings": given}
    )
    device = tuning.device.model_copy(update={"name": HOSTILE, "source": HOSTILE})
    names = ("model", "target", "verdict", "bundle", "winner", "reference")
    return tuning.model_copy(
        update=dict.fromkeys(names, HOSTILE)
        | {
            "candidates": (first, *tuning.candidates[1:]),
            "device": device,
            "tasks": (HOSTILE,),
            "notes": (HOSTILE,),
            "seconds": {HOSTILE: 1.0},
            "recipe": given,
        }
    )


def test_hostile_text_becomes_no_element(tuning: Tuning, page: str) -> None:
    """The only elements are the template's own, whoever wrote the file."""
    spoiled = render(spoil(tuning))
    elements = Elements(spoiled)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in spoiled
    assert elements.tags.count("script") == Elements(page).tags.count("script") == 1
    assert not {"iframe", "object", "embed", "img", "link", "base"} & set(elements.tags)
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", spoiled)


def test_only_the_script_and_style_of_the_page_run(page: str) -> None:
    """The policy names both by their hashes and allows nothing else; nothing is fetched."""
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    assert policy.replace("&#39;", "'") == (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )

    elements = Elements(page)
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}
    links = [value for _, name, value in elements.attributes if name in loading]
    ids = {f"#{value}" for _, name, value in elements.attributes if name == "id"}
    assert links
    assert set(links) <= ids
    assert not re.search(r"url\(|@import|http(?!-equiv)| style=", page)


def test_links_and_headings_say_the_same(page: str) -> None:
    """In the same order; each heading is at most one level below the one before it."""
    headings = re.findall(r"<h([1-6])[^>]*>\s*(.*?)\s*<", page)
    levels = [int(level) for level, _ in headings]
    assert Elements(page).words("a") == [text for level, text in headings if level == "2"]
    assert levels[0] == levels.count(1) == 1
    assert all(below <= level + 1 for level, below in itertools.pairwise(levels))


def test_the_page_says_who_wins_and_whether_the_limits_are_kept(tuning: Tuning, page: str) -> None:
    """A limit that the winner misses, or an accuracy that is unknown, changes the badge."""
    header = page[page.index("<header") : page.index("<nav")]
    assert tuning.verdict in header
    assert "every limit kept" in header
    assert "Raspberry Pi 5, 8 GB, 4 cores; figures estimated" in header

    winner = tuning.find(tuning.winner)
    assert winner
    others = tuple(each for each in tuning.candidates if each is not winner)
    missed = winner.model_copy(update={"meets_limits": False})
    for changed in ({"reference": ""}, {"candidates": (missed, *others)}):
        assert not meets_limits(tuning.model_copy(update=changed))
        assert "not every limit kept" in render(tuning.model_copy(update=changed))


def test_the_facts_say_what_was_asked_and_what_it_took(tuning: Tuning) -> None:
    """The limits, and the time beside the budget."""
    facts = dict(list_facts(tuning))
    assert facts["Constraints"].startswith("best seconds per correct answer, 100,000,000 bytes")
    assert facts["Time"].startswith("1 h 1 min of 1 h 30 min: traces 7 min, measure 38 s")

    measured = tuning.device.model_copy(update={"measured": True, "cores": 1})
    assert "8 GB, 1 core; figures measured on it: 11.4 GB/s" in describe_device(measured)


def test_the_table_has_the_winner_its_rival_and_then_the_farthest(tuning: Tuning) -> None:
    """Whoever did not answer has a reason; without them only those that did are left."""
    table = make_tuning_table(tuning)
    assert len(table.rows) == len(tuning.candidates) == 22
    assert [row[0] for row in table.rows[:3]] == [
        "50% Q4_0 codes, winner",
        "Q4_0 (dense), rival",
        "Q2_K codes (dense)",
    ]
    stages = [row[1] for row in table.rows]
    assert stages[13:] == sorted(stages[13:], key=["compared", "counted"].index)
    assert all(row[-1] for row in table.rows[13:])
    assert len(make_tuning_table(tuning, answered=True).rows) == 13
    assert set(make_tuning_table(tuning, brief=True).columns) < set(table.columns)


def test_every_model_that_answered_has_a_point(tuning: Tuning) -> None:
    """Limits within the picture are lines; the winner and its rival have names."""
    drawn = str(draw_accuracy(tuning))
    assert drawn.count("<circle") == 13
    assert drawn.count("stroke-dasharray") == 2
    assert drawn.count('fill="var(--dense)"') == 7
    assert re.findall(r'class="name"[^>]*>([^<]+)<', drawn) == ["Q4_0", "50% Q4_0 codes"]

    far = tuning.constraints.model_copy(
        update={"max_bytes": 1_500_000_000, "min_accuracy_ratio": None}
    )
    assert "dasharray" not in draw_accuracy(tuning.model_copy(update={"constraints": far}))


def test_all_of_the_picture_is_inside(tuning: Tuning) -> None:
    """Points, bars and names, also of a single model with every answer right."""
    (winner,) = (each for each in tuning.candidates if each.name == tuning.winner)
    lone = tuning.model_copy(update={"candidates": (winner,), "rival": "", "reference": ""})
    for one in (tuning, lone):
        drawn = str(draw_accuracy(one))
        places = re.findall(r'\b([xy])\d?="([-\d.]+)"|\bc([xy])="([-\d.]+)"', drawn)
        for name, value, other, center in places:
            most = 760 if (name or other) == "x" else 400
            assert 0 <= float(value or center) <= most


def test_a_model_without_a_right_answer_says_so(tuning: Tuning) -> None:
    """Its seconds have no end; nothing on the page is infinite or no number."""
    never = CostEstimate(value=float("inf"), lower=9.0, upper=float("inf"))
    changed = []
    for each in tuning.candidates:
        update = {"seconds_per_correct": never} if each.name == "Q3_K" else {}
        changed.append(each.model_copy(update=update))
    spoiled = tuning.model_copy(update={"candidates": tuple(changed)})
    page = render(spoiled)
    assert "∞ (9 to ∞)" in page
    assert not re.search(r"\b(nan|inf)\b", page)


def test_a_terminal_of_80_columns_breaks_no_word(tuning: Tuning) -> None:
    """The verdict comes last, where it is seen."""
    stream = io.StringIO()
    print_tuning(tuning, Console(file=stream, width=80, force_terminal=True, no_color=True))
    lines = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert "right answers (90 % interval −0.4 to 4.7)." in " ".join(lines[-3:])

    stream = io.StringIO()
    print_tuning(tuning, Console(file=stream))
    assert "tokens/s, measured" in stream.getvalue()
    assert "9 candidates did not answer" in stream.getvalue()


def test_names_are_those_of_candidates(tuning: Tuning) -> None:
    """Two of one name, or a winner that is none, are refused."""
    data = json.loads(tuning.model_dump_json())
    for changes in (
        {"winner": "another"},
        {"rival": "another"},
        {"candidates": [*data["candidates"], data["candidates"][0]]},
    ):
        with pytest.raises(ValidationError):
            Tuning.model_validate(data | changes)


def test_a_search_is_written_and_read_again(tuning: Tuning, tmp_path: Path) -> None:
    """The page and the recipe follow from the data; damaged data is an error with a remedy."""
    folder = tmp_path / "found"
    write_tuning(folder, tuning)
    assert read_tuning(folder / FILE) == tuning
    assert read_toml(folder / RECIPE) == tuning.recipe

    assert (folder / PAGE).read_text() == render(tuning)

    for text, code in (
        ("[]", "json-not-an-object"),
        ("{}", "damaged-report"),
        ("{", "invalid-json"),
        ('{"winner": 7}', "damaged-report"),
    ):
        (folder / FILE).write_text(text)
        with raises(code, FILE):
            read_tuning(folder / FILE)
    with raises("report-file-unreadable", "absent.json"):
        read_tuning(folder / "absent.json")


def test_a_candidate_of_nothing_but_bytes_is_enough() -> None:
    """What a first stage knows."""
    Candidate(name="a", dense=True, reached="counted", size_bytes=1, meets_limits=False)

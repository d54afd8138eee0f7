"""The page of a search: nothing is fetched, text stays text, pictures say what was found."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shlex

import pytest
from pydantic import ValidationError

from racdeploy.errors import ArtifactError
from racdeploy.report import tuning_charts
from racdeploy.report.labels import Box, Label
from racdeploy.report.tuning import Candidate, CostInterval, Tuning
from racdeploy.report.tuning_files import FILE, PAGE, read_tuning, write_page, write_tuning
from racdeploy.report.tuning_page import render
from racdeploy.report.tuning_tables import write_build
from tests.support.elements import Elements
from tests.support.sample_report import HOSTILE
from tests.support.sample_tuning import build_tuning

CHARTS = (
    tuning_charts.accuracy_over_size,
    tuning_charts.accuracy_over_speed,
    tuning_charts.seconds_over_size,
)


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    return build_tuning()


@pytest.fixture(scope="module")
def page(tuning: Tuning) -> str:
    return render(tuning)


def change(tuning: Tuning, name: str, **values: object) -> Tuning:
    """Return a search in which a candidate has other values."""
    changed = [
        each.model_copy(update=values) if each.name == name else each for each in tuning.candidates
    ]
    return tuning.model_copy(update={"candidates": tuple(changed)})


def spoil(tuning: Tuning) -> Tuning:
    """Return a search whose every text is from somebody who means harm."""
    first = tuning.candidates[0].model_copy(
        update={
            "name": HOSTILE,
            "why": HOSTILE,
            "settings": {HOSTILE: HOSTILE, "export.tensors": {HOSTILE: HOSTILE}},
        }
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
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_links_and_headings_say_the_same(page: str) -> None:
    """In the same order; each heading is at most one level below the one before it."""
    headings = re.findall(r"<h([1-6])[^>]*>\s*(.*?)\s*<", page)
    levels = [int(level) for level, _ in headings]
    assert Elements(page).words("a") == [text for level, text in headings if level == "2"]
    assert levels[0] == levels.count(1) == 1
    assert all(below <= level + 1 for level, below in itertools.pairwise(levels))


def test_the_page_says_who_wins_and_whether_the_wishes_are_kept(tuning: Tuning, page: str) -> None:
    """A limit that the winner misses changes the badge and its row."""
    header = page[page.index("<header") : page.index("<nav")]
    assert tuning.verdict in header
    assert "every limit kept" in header
    assert "Raspberry Pi 5, 8 GB, 4 cores; figures estimated" in header

    wishes = tuning.wishes.model_copy(update={"max_bytes": 50_000_000})
    missed = render(tuning.model_copy(update={"wishes": wishes}))
    assert "not every limit kept" in missed
    assert re.search(r"at most 50 MB</td><td[^>]*>82.9 MB</td><td[^>]*>no</td>", missed)


def test_dense_pruned_hollow_and_winner_are_told_apart(tuning: Tuning) -> None:
    """One mark for each model that answered, but for the one that is far off, which is named."""
    drawn = str(tuning_charts.accuracy_over_size(tuning))
    kinds = re.findall(r'<g class="arm ([\w ]+)"><title>([^:]+):', drawn)
    assert len(kinds) == 12
    assert kinds[-1] == ("pruned best", "50% Q4_0 joint")
    assert ("dense", "Q8_0") in kinds
    assert ("dense off", "Q4_0") in kinds
    assert ("pruned off", "mix at 3.4 bits") in kinds
    assert tuning_charts.describe_left_out(tuning)["accuracy"] == (
        "Too far off to draw: Q2_K joint (61.2%)."
    )


def test_limits_are_lines_where_the_axes_reach_them(tuning: Tuning) -> None:
    """Size and accuracy, speed and accuracy, size; one far away is left out."""
    assert [str(chart(tuning)).count('class="cap"') for chart in CHARTS] == [2, 2, 1]
    assert "at most 100 MB" in tuning_charts.accuracy_over_size(tuning)
    assert "at least 83.6%" in tuning_charts.accuracy_over_size(tuning)  # 95% of 88%

    wishes = tuning.wishes.model_copy(
        update={"max_bytes": 1_500_000_000, "min_accuracy_ratio": None, "min_tokens_per_s": None}
    )
    loose = tuning.model_copy(update={"wishes": wishes})
    assert [str(chart(loose)).count('class="cap"') for chart in CHARTS] == [0, 0, 0]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
def test_names_keep_clear_of_each_other_and_inside(chart: object, tuning: Tuning) -> None:
    """Bars and names stay in the picture; no name covers more than a hair of another."""
    drawn = str(chart(tuning))  # type: ignore[operator]
    width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
    boxes = [
        Label(text, complex(float(x), float(y)), anchor, 0j).box  # type: ignore[arg-type]
        for x, y, anchor, text in re.findall(
            r'class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', drawn
        )
    ]
    bars = re.findall(r'<line x1="([\d.]+)" x2="\1" y1="([-\d.]+)" y2="([-\d.]+)"/><circle', drawn)
    picture = Box(0, 0, width, height)

    assert len(boxes) >= 6
    assert all(box.outside(picture) == 0 for box in boxes)
    assert all(0 <= float(y) <= height for _, *ends in bars for y in ends)
    pairs = itertools.combinations(boxes, 2)
    assert max(first.shared(second) for first, second in pairs) < 40


def test_a_model_without_a_right_answer_has_no_place_among_the_seconds(tuning: Tuning) -> None:
    """Its seconds have no end; nothing on the page is infinite or no number."""
    never = CostInterval(value=float("inf"), lower=9.0, upper=float("inf"))
    changed = change(tuning, "Q3_K", seconds_per_correct=never)
    page = render(changed)
    assert "Q3_K:" not in tuning_charts.seconds_over_size(changed)
    assert "∞ (9 to ∞)" in page
    assert not re.search(r"\b(nan|inf)\b", page)


def test_what_shows_nothing_is_not_drawn(tuning: Tuning) -> None:
    """A single model, no limits: words and tables, and no chart."""
    (winner,) = (each for each in tuning.candidates if each.name == tuning.winner)
    lone = tuning.model_copy(update={"candidates": (winner,), "rival": "", "reference": ""})
    page = render(lone)
    assert "<svg" not in page
    assert "did not answer" not in page
    assert Elements(page).tags.count("table") == 3


def test_the_command_of_a_candidate_is_taken_as_toml(tuning: Tuning, page: str) -> None:
    """Every candidate has one; text, flags, numbers and tables arrive as they were."""
    from racdeploy.storage.toml import read_assignments

    assert (
        Elements(page)
        .values("button", "data-copy")
        .count(write_build(tuning, tuning.candidates[0]))
    )
    mix = next(each for each in tuning.candidates if each.name == "mix at 3.4 bits")
    words = shlex.split(write_build(tuning, mix))
    assigned = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert read_assignments(assigned) == {
        "traces": {"max_new_tokens": 400},
        "export": {"quant": "q4_0", "tensors": {r"attn_v\.weight$": "q5_0"}},
        "prune": {"sparsity": 0.5},
    }
    nested = {"prune": {"sparsity": 0.5, "joint": None}, "export": {"quant": "q4_0"}}
    by_part = mix.model_copy(update={"settings": nested})
    words_by_part = shlex.split(write_build(tuning, by_part))
    assert words_by_part[-4:] == ["--set", "prune.sparsity=0.5", "--set", 'export.quant="q4_0"']
    assert words[:4] == ["racdeploy", "build", "SmolLM2-135M-reasoner", "--target"]


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


def test_a_search_is_written_and_read_again(tuning: Tuning, tmp_path: object) -> None:
    """The page follows from the data alone; damaged data is an error with a remedy."""
    folder = tmp_path / "found"  # type: ignore[operator]
    write_tuning(folder, tuning)
    assert read_tuning(folder / FILE) == tuning

    first = (folder / PAGE).read_text()
    (folder / PAGE).write_text("old")
    assert write_page(folder / FILE) == folder / PAGE
    assert (folder / PAGE).read_text() == first

    for text in ("[]", "{}", "{", '{"winner": 7}'):
        (folder / FILE).write_text(text)
        with pytest.raises(ArtifactError):
            read_tuning(folder / FILE)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_tuning(folder / "absent.json")


def test_a_candidate_of_nothing_but_bytes_is_enough() -> None:
    """What a first stage knows."""
    Candidate(name="a", dense=True, reached="counted", size_bytes=1, keeps_limits=False)

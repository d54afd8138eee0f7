"""HTML: only its own script runs, nothing is fetched, it stays small, every chart is drawn."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import tomllib
from typing import Any

import pytest

from racdeploy.report import html
from racdeploy.results.answers import AnswerRecord, ArmSummary
from racdeploy.results.report import Report
from tests.support.elements import Elements
from tests.support.sample_report import HOSTILE


def prompts(page: str) -> list[dict[str, Any]]:
    """Return the prompts as the page's script reads them."""
    (text,) = re.findall(r'id="prompts-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def discordant(records: list[AnswerRecord], count: int, **values: object) -> list[AnswerRecord]:
    """Return pairs of records of which pruned is wrong."""
    return [
        template.model_copy(update={"prompt": prompt, "correct": template.arm == "dense", **values})
        for prompt in range(count)
        for template in records[:2]
    ]


def test_hostile_text_becomes_no_element(report: Report, records: list[AnswerRecord]) -> None:
    """The only elements are the template's own, whoever wrote model name, prompt, arm and
    linear.
    """
    rival = report.arms[1].model_copy(update={"name": '"/><script>x</script>'})
    linear = report.linears[0].model_copy(update={"name": f"a.1.{HOSTILE}"})
    spoiled = report.model_copy(
        update={
            "model": HOSTILE,
            "target": HOSTILE,
            "arms": (*report.arms, rival),
            "linears": (*report.linears, linear),
            "recovery": (
                *report.recovery,
                report.recovery[1].model_copy(update={"phase": HOSTILE}),
            ),
            "recipe": {HOSTILE: HOSTILE, "prune": HOSTILE, "export": {"format": 7}},
        }
    )
    page = html.render(spoiled, records, HOSTILE)
    elements = Elements(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert elements.tags.count("script") == Elements(html.render(report, records)).tags.count(
        "script"
    )
    assert not {"iframe", "object", "embed", "img", "link", "base"} & set(elements.tags)
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "]]>",
        "\u2028\u2029",
        "</ScRiPt >",
        "&lt;/script&gt;",
    ],
)
def test_no_text_ends_the_data(records: list[AnswerRecord], report: Report, text: str) -> None:
    """What a model says is data to the script, character by character, and never markup."""
    names = ("question", "gold", "task", "thinking_text", "answer_text", "extracted")
    hostile = discordant(records, 1, **dict.fromkeys(names, text))
    page = html.render(report, hostile)
    elements = Elements(page)

    data = re.findall(r'id="prompts-data">(.*?)</script>', page, re.DOTALL)[0]
    assert not re.search("[<>&\u2028\u2029]", data)
    (entry,) = json.loads(data)
    assert entry["question"] == entry["dense"]["thinking"] == entry["pruned"]["answer"] == text
    assert elements.tags.count("script") == 2


def test_only_the_script_and_style_of_the_page_run(
    report: Report, records: list[AnswerRecord]
) -> None:
    """The policy names both by the hash of what is between their tags, and allows nothing else."""
    page = html.render(report, records)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    policy = policy.replace("&#39;", "'")
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)

    assert policy == (
        f"default-src 'none'; style-src 'sha256-{_hash(style)}'; script-src "
        f"'sha256-{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    assert Elements(page).values("div", "style") == []
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", script
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_page_fetches_nothing(report: Report, records: list[AnswerRecord]) -> None:
    """No attribute that loads, no CSS import, no address outside the hostile prompts, and a policy
    on top.
    """
    page = html.render(report, records)
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}
    elements = Elements(page)
    found = [(tag, name, value) for tag, name, value in elements.attributes if name in loading]
    ids = {value for _, name, value in elements.attributes if name == "id"}
    assert {(tag, name) for tag, name, _ in found} == {("a", "href")}
    assert {value[1:] for *_, value in found if value[0] == "#"} <= ids
    assert all(value[0] == "#" for *_, value in found)
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page.replace("https://example.org/x", "").replace("http-equiv", "")
    assert "default-src 'none'" in page.replace("&#39;", "'")


def test_the_chart_has_a_point_for_each_prompt(report: Report, records: list[AnswerRecord]) -> None:
    """With a text for screen readers."""
    elements = Elements(html.render(report, records))
    assert len(elements.values("svg", "aria-label")) == 2
    classes = [value for _, name, value in elements.attributes if name == "class"]
    dots = [value for value in classes if re.fullmatch("dot (lost|won|right|wrong)", value)]
    assert len(dots) == 256
    assert (dots.count("dot lost"), dots.count("dot won")) == (4, 2)


def test_more_models_than_two_are_drawn_by_accuracy_and_thinking(report: Report) -> None:
    """Each at its place, with its name; of two models alone there is no such chart."""
    dense, pruned, *_ = report.arms
    points = {"dense": (80, 200), "dense, budget 120": (70, 120), "pruned": (79, 120)}
    arms = [
        (pruned if name == "pruned" else dense).model_copy(
            update={"name": name, "accuracy": right / 100, "thinking_tokens_mean": tokens}
        )
        for name, (right, tokens) in points.items()
    ]
    page = html.render(report.model_copy(update={"arms": tuple(arms)}))
    assert re.findall(r'<text class="name"[^>]*>([^<]+)<', page) == list(points)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="(\S+)" cy="(\S+)"', page)]
    whole, budget, shortened = places
    assert budget[0] == shortened[0] < whole[0]
    assert budget[1] > shortened[1] > whole[1]

    two = report.model_copy(update={"arms": tuple(arms[:2])})
    assert "<circle" not in html.render(two)


def test_what_shows_nothing_is_not_drawn(report: Report, records: list[AnswerRecord]) -> None:
    """A single model and no records: no chart."""
    lone = html.render(report.model_copy(update={"arms": report.arms[1:2]}), [])
    assert not Elements(lone).values("svg", "aria-label")


def test_links_and_headings_say_the_same(report: Report, records: list[AnswerRecord]) -> None:
    """In the same order; each heading is at most one level below the one before it."""
    page = html.render(report, records)
    elements = Elements(page)
    headings = re.findall(r"<h([1-6])[^>]*>\s*(.*?)\s*<", page)
    levels = [int(level) for level, _ in headings]

    assert elements.words("a") == [text for level, text in headings if level == "2"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= level + 1 for level, below in itertools.pairwise(levels))
    titles = [text for level, text in headings if level == "3"]
    assert "Thinking by prompt" in titles
    assert "Worst linears" in titles


def test_the_header_says_what_was_built_and_how_to_run_it(
    report: Report, records: list[AnswerRecord]
) -> None:
    """Method, zeros, number format, file, hash and size; hash and command are copied whole."""
    sha256 = "ab" * 32
    pruned = report.arms[1].model_copy(
        update={"files": {"model-Q8_0.gguf": sha256, "model.imatrix.gguf": "cd" * 32}}
    )
    recipe = {
        "calibration": {"source": "rac"},
        "prune": {"method": "sparsegpt", "sparsity": 0.5, "pattern": "unstructured"},
        "export": {"format": "gguf", "quant": "q8_0", "packing": "bitmask"},
    }
    built = report.model_copy(update={"arms": (report.arms[0], pruned), "recipe": recipe})
    short = [record.model_copy(update={"question": "What is 2 + 2?"}) for record in records]
    page = html.render(built, short, "my bundle")
    header = page[page.index("<header") : page.index("<nav")]
    elements = Elements(header)

    texts = [text for text in elements.words("dd") if text.strip()]
    assert [text.strip() for text in texts] == [
        "sparsegpt, calibrated on its own chain of thought",
        "50.0% of the prunable weights, unstructured",
        "GGUF, Q8_0, packed as bitmask",
        "model-Q8_0.gguf and 1 more",
        "abababababababab…",
    ]
    command = "racdeploy run 'my bundle' 'What is 2 + 2?'"
    assert elements.values("button", "data-copy") == ["model-Q8_0.gguf", sha256, command]
    assert "No measurable loss: 0.8 points, at most 2.6" in header
    assert "Thoughts that never end: 1 of 256, dense 0." in header
    assert "racdeploy run" not in html.render(built, short)


def test_the_quantiles_of_the_lengths_are_on_the_page(
    report: Report, records: list[AnswerRecord]
) -> None:
    dense = sorted(record.thinking_tokens for record in records if record.arm == "dense")
    pruned = sorted(record.thinking_tokens for record in records if record.arm == "pruned")
    assert len(dense) == len(pruned) == 256
    expected = [
        ("half are at most", 127),
        ("nine of ten are at most", 230),
        ("longest", 255),
    ]  # ceil(0.9 × 256) = 231
    page = html.render(report, records)
    for name, place in expected:
        row = f'<td class="number">{dense[place]}</td><td class="number">{pruned[place]}</td>'
        assert f"<td>{name}</td>{row}" in page


def test_discordant_prompts_can_be_read_without_a_script(
    report: Report, records: list[AnswerRecord]
) -> None:
    """One disclosure per prompt, those that pruning lost first, both thoughts inside; controls that
    need the script are hidden.
    """
    page = html.render(report, records)
    summaries = re.findall(r"<strong>(Lost|Won)</strong>.*?#(\d+)", page)
    assert summaries == [
        ("Lost", "7"), ("Lost", "19"), ("Lost", "63"), ("Lost", "200"), ("Won", "11"), ("Won", "40")
    ]  # fmt: skip
    assert page.count('aria-label="thinking of the dense model"') == 6
    hidden = [tag for tag, name, _ in Elements(page).attributes if name == "hidden"]
    assert {"form", "button", "p"} == set(hidden)
    assert hidden.count("button") == page.count('class="copy"')


def test_a_long_question_is_cut_with_a_sign(report: Report, records: list[AnswerRecord]) -> None:
    """In the line of a prompt; the whole question is inside."""
    question = "How many stamps does Ann have " + "now and then " * 40 + "today?"
    page = html.render(report, discordant(records, 1, question=question))
    (asked,) = re.findall(r'<span class="asked">(.*?)</span>', page)
    assert asked.endswith("…")
    assert len(asked) == 160
    assert question in page


def test_the_script_gets_every_prompt_of_a_usual_run(
    report: Report, records: list[AnswerRecord]
) -> None:
    """Lost ones first, then won, then those on which the models agree; all with both thoughts."""
    entries = prompts(html.render(report, records))
    outcomes = [entry["outcome"] for entry in entries]
    assert outcomes == ["lost"] * 4 + ["won"] * 2 + ["right"] * 250
    assert {entry["prompt"] for entry in entries} == set(range(256))
    assert all("thinking" in entry["dense"] for entry in entries)
    assert {entry["task"] for entry in entries} == {"gcd", "word_problem"}


def test_the_page_follows_light_and_dark_and_paper(report: Report) -> None:
    """By the reader's setting; paper is white, opened and without controls."""
    page = html.render(report)
    assert "@media screen and (prefers-color-scheme: dark)" in page
    assert "@media print" in page
    assert "beforeprint" in page


def test_a_large_run_stays_below_six_megabytes(report: Report, records: list[AnswerRecord]) -> None:
    """Ten thousand prompts, all discordant, with thinking made of characters that grow when
    escaped, that of a thousand long; what is left out is counted.
    """
    many = discordant(records, 10_000, thinking_text="<&>'\"" * 600, state="open")
    many[:2000] = discordant(records, 1000, thinking_text="<&>'\"" * 6000, state="open")
    page = html.render(report, many)
    entries = prompts(page)
    with_thoughts = [entry for entry in entries if "thinking" in entry["dense"]]
    brief, missing = len(entries) - len(with_thoughts), 10_000 - len(entries)

    assert len(page.encode()) < 6_000_000
    assert with_thoughts
    assert f"The thoughts of {brief:,} prompts are only in records.jsonl" in page
    assert f"{missing:,} more prompts are only in records.jsonl." in page
    assert "6,000 more characters in records.jsonl" in page
    assert "At most 2,000 of the 10,000 prompts are drawn." in page


def test_five_thousand_ordinary_prompts_are_all_there(
    report: Report, records: list[AnswerRecord]
) -> None:
    """With what a reader looks for first: question, answers and lengths."""
    many = [
        record.model_copy(update={"prompt": 256 * round + record.prompt})
        for round in range(20)
        for record in records
    ][: 2 * 5000]
    page = html.render(report, many)
    assert len(prompts(page)) == 5000
    assert "only in records.jsonl" not in page
    assert len(Elements(page).tags) < 12_000


def test_an_empty_report_renders(report: Report) -> None:
    """A verification that died early still has a page."""
    page = html.render(Report(created=report.created, model="m", target="t"), [])
    assert "svg" not in Elements(page).tags
    assert "No check ran, and missing data never passes." in page


def test_degenerate_charts_render(report: Report, records: list[AnswerRecord]) -> None:
    """No thinking at all, equal numbers, one linear: no division by a zero span."""
    alike = [
        ArmSummary(
            name=name,
            prompts=1,
            correct=1,
            accuracy=1,
            accuracy_lower=1,
            accuracy_upper=1,
            thinking_tokens_mean=0,
            size_bytes=7,
        )
        for name in ("dense", "pruned")
    ]
    silent = [record.model_copy(update={"thinking_tokens": 0}) for record in records[:2]]
    page = html.render(
        report.model_copy(update={"arms": tuple(alike), "linears": report.linears[:1]}), silent
    )
    assert "nan" not in page
    assert "inf%" not in page
    assert Elements(page).tags.count("svg") == 1


def test_what_both_thoughts_begin_with_ends_at_a_word(
    report: Report, records: list[AnswerRecord]
) -> None:
    """The grey part is common to both sides and never cuts a word; equal thoughts are grey as a
    whole. The script gets the same in units of UTF-16.
    """
    dense, pruned = records[2 * 7 : 2 * 7 + 2]
    for texts, shared in (
        (("12+30=42 so", "12+30=43 so"), ""),
        (("add 12 and 30", "add 12 and 31"), "add 12 and "),
        (("the same", "the same"), "the same"),
        (("\U0001f600 and 1", "\U0001f600 and 2"), "\U0001f600 and "),
    ):
        pair = [
            record.model_copy(update={"thinking_text": t})
            for record, t in zip((dense, pruned), texts, strict=True)
        ]
        page = html.render(report, pair)
        assert re.findall(r'<span class="shared">(.*?)</span>', page) == (
            [shared] * 2 if shared else []
        )
        assert prompts(page)[0]["shared"] == len(shared.encode("utf-16-le")) // 2


def test_recipe_and_machine_are_shown_and_copied_as_toml(
    report: Report, records: list[AnswerRecord]
) -> None:
    """What is copied is the recipe again, and so is what is shown; no JSON is."""
    recipe = {
        "model": 'a "quoted" name',
        "also": ["browser"],
        "export": {"pre_tokenizer": None, "tensors": {"blk.*.ffn": "q8_0"}},
        "prune": {"sparsity": 0.5, "ignore": ["a$", "b$"], "steps": []},
    }
    page = html.render(report.model_copy(update={"recipe": recipe}), records)
    elements = Elements(page)
    copied = [text for text in elements.values("button", "data-copy") if "[prune]" in text]
    assert [tomllib.loads(text) for text in copied] == [
        {**recipe, "export": {"tensors": {"blk.*.ffn": "q8_0"}}}
    ]
    assert copied == [text for text in elements.words("pre") if "[prune]" in text]
    assert "sparsity&#34;:" not in page

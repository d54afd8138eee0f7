"""HTML: nothing runs, nothing is fetched, it stays small, and every chart is drawn."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from racdeploy.report import html
from racdeploy.report.model import ArmSummary, Record, Report
from tests.support.sample_report import HOSTILE

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Elements(HTMLParser):
    """Collects tags and attributes, and checks that elements close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def test_hostile_text_becomes_no_element(report: Report, records: list[Record]) -> None:
    """The only elements are the template's own, whoever wrote model name, prompt, arm and
    linear.
    """
    spoiled = report.model_copy(
        update={
            "model": HOSTILE,
            "target": HOSTILE,
            "arms": (
                *report.arms,
                report.arms[1].model_copy(update={"name": '"/><script>x</script>'}),
            ),
            "linears": (
                *report.linears,
                report.linears[0].model_copy(update={"name": f"a.1.{HOSTILE}"}),
            ),
            "recovery": (
                *report.recovery,
                report.recovery[1].model_copy(update={"phase": HOSTILE}),
            ),
            "recipe": {HOSTILE: HOSTILE},
        }
    )
    page = html.render(spoiled, records)
    elements = Elements(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not {"script", "iframe", "object", "embed", "img", "link", "base"} & set(elements.tags)
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)


def test_the_page_fetches_nothing(report: Report, records: list[Record]) -> None:
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
    assert "default-src 'none'" in page


def test_every_chart_is_drawn_once(report: Report, records: list[Record]) -> None:
    """Three of accuracy, scatter, histogram, two heat maps, the divergence and two of the recovery,
    all with a text for screen readers.
    """
    elements = Elements(html.render(report, records))
    labels = [
        value for tag, name, value in elements.attributes if (tag, name) == ("svg", "aria-label")
    ]
    assert len({*labels}) == len(labels) == 10
    classes = [value for _, name, value in elements.attributes if name == "class"]
    assert classes.count("arrow") == 1
    assert classes.count("cap") == 2
    assert classes.count("heat") == 2 * (
        len(report.linears) + 8
    )  # eight shades in the key of each map
    assert classes.count("dot pruning") == classes.count("dot export") == len(report.positions)
    assert sum(classes.count(outcome) for outcome in ("same", "won", "lost")) == 256
    assert (classes.count("lost"), classes.count("won")) == (4, 2)


def test_the_quantiles_of_the_lengths_stand_beside_the_histogram(
    report: Report, records: list[Record]
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
        assert f"<td>{name}</td><td>{dense[place]}</td><td>{pruned[place]}</td>" in page


def test_discordant_prompts_can_be_browsed_without_a_script(
    report: Report, records: list[Record]
) -> None:
    """One disclosure per prompt, those that pruning lost first, both thoughts inside."""
    page = html.render(report, records)
    summaries = re.findall(r"<strong>(Lost|Won)</strong>.*?prompt (\d+)", page)
    assert summaries == [
        ("Lost", "7"), ("Lost", "19"), ("Lost", "63"), ("Lost", "200"), ("Won", "11"), ("Won", "40")
    ]  # fmt: skip
    assert page.count('aria-label="thinking of the dense model"') == 6


def test_the_page_follows_light_and_dark(report: Report) -> None:
    """By the reader's setting."""
    assert "prefers-color-scheme: dark" in html.render(report)


def test_a_large_run_stays_below_two_megabytes(report: Report, records: list[Record]) -> None:
    """Ten thousand prompts, all discordant, with long thinking made of characters that grow when
    escaped.
    """
    text = "<&>'\"" * 6000
    many = [
        template.model_copy(
            update={
                "prompt": prompt,
                "correct": template.arm == "dense",
                "thinking_text": text,
                "state": "open",
            }
        )
        for prompt in range(10_000)
        for template in records[:2]
    ]
    page = html.render(report, many)
    assert len(page.encode()) < 2_000_000
    assert "are left to records.jsonl" in page
    assert "6000 more characters in records.jsonl" in page
    assert "at most 2000 are drawn" in page


def test_an_empty_report_renders(report: Report) -> None:
    """A verification that died early still has a page."""
    page = html.render(Report(created=report.created, model="m", target="t"), [])
    assert "svg" not in Elements(page).tags
    assert "No check ran, and missing data never passes." in page


def test_degenerate_charts_render(report: Report, records: list[Record]) -> None:
    """One arm, no thinking at all, equal numbers: no division by a zero span."""
    lone = ArmSummary(
        name="dense",
        prompts=1,
        correct=1,
        accuracy=1,
        accuracy_lower=1,
        accuracy_upper=1,
        thinking_tokens_mean=0,
    )
    silent = [record.model_copy(update={"thinking_tokens": 0}) for record in records[:2]]
    page = html.render(
        report.model_copy(update={"arms": (lone,), "linears": report.linears[:1]}), silent
    )
    assert "nan" not in page
    assert Elements(page).tags.count("svg") == 8


def test_what_both_thoughts_begin_with_ends_at_a_word(
    report: Report, records: list[Record]
) -> None:
    """The grey part is common to both sides and never cuts a word; equal thoughts are grey as a
    whole.
    """
    dense, pruned = records[2 * 7 : 2 * 7 + 2]
    for texts, shared in (
        (("12+30=42 so", "12+30=43 so"), ""),
        (("add 12 and 30", "add 12 and 31"), "add 12 and "),
        (("the same", "the same"), "the same"),
    ):
        pair = [
            record.model_copy(update={"thinking_text": t})
            for record, t in zip((dense, pruned), texts, strict=True)
        ]
        found = re.findall(r'<span class="shared">(.*?)</span>', html.render(report, pair))
        assert found == ([shared] * 2 if shared else [])


def test_tasks_are_filtered_by_number(report: Report, records: list[Record]) -> None:
    """A hostile task name is a label and never a selector; one task alone needs no filter."""
    hostile = [r.model_copy(update={"task": HOSTILE}) if r.prompt == 7 else r for r in records]
    page = html.render(report, hostile)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "octocat" not in style
    assert style.count(":has(#task-") == 3
    assert 'id="task-' not in html.render(report, records[14:16])

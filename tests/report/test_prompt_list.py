"""The page in a real browser: only its own script runs, nothing is fetched, and everything can be
reached by keyboard.

Slow because it needs Chromium and chromedriver, which a bare machine does not have: ``apt-get
install chromium chromium-driver``, then ``pytest -m slow tests/report/test_prompt_list.py``. The
pictures are kept in the folder that ``RACDEPLOY_SCREENSHOTS`` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from racdeploy.report import html
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report
from tests.support.browser import CHROMIUM, DRIVER, Browser, browser
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver"),
]

# What each would do if it ran: leave a mark on the window, or ask a server.
ATTACKS = (
    "<script>window.attacked=1</script>",
    "<img src=x onerror='window.attacked=1'>",
    "<svg onload='window.attacked=1'>",
    "</style><script>window.attacked=1</script>",
    "</title><script src=http://127.0.0.1:9/x.js></script>",
    "\"><iframe srcdoc='<script>parent.attacked=1</script>'></iframe>",
    "'}</style><link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    "<details open ontoggle=window.attacked=1>",
    "{{ 7 * 7 }}{% raw %}",
    "<a href='javascript:window.attacked=1' autofocus onfocus='window.attacked=1'>x</a>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
)
SIZES = ((1280, False), (1280, True), (400, False), (400, True))
TAB, ENTER = "\ue004", "\ue007"
STATE = "return document.getElementById('browse-state').textContent"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(report: Report, records: list[AnswerRecord], tmp_path: Path) -> Path:
    file = tmp_path / "report.html"
    file.write_text(html.render(report, records), encoding="utf-8")
    return file


def _requests(window: Browser) -> list[str]:
    """Return the addresses that were asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in window.log("performance")]
    return [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]


def test_hostile_text_runs_nothing_and_fetches_nothing(
    window: Browser, report: Report, records: list[AnswerRecord], tmp_path: Path
) -> None:
    """Each attack in every place where text comes from outside; the only request is the page
    itself.
    """
    attack = " ".join(ATTACKS)
    hostile = [
        record.model_copy(
            update=dict.fromkeys(
                ("task", "question", "gold", "extracted", "answer_text", "thinking_text"), attack
            )
        )
        for record in records
    ]
    spoiled = report.model_copy(
        update={
            "model": attack,
            "target": attack,
            "notes": (attack,),
            "arms": tuple(arm.model_copy(update={"quant": attack}) for arm in report.arms),
            "checks": tuple(
                check.model_copy(update={"summary": attack, "remedy": attack})
                for check in report.checks
            ),
            "linears": tuple(
                row.model_copy(update={"name": f"a.1.{attack}"}) for row in report.linears
            ),
            "recipe": {attack: attack},
        }
    )
    file = tmp_path / "hostile.html"
    file.write_text(html.render(spoiled, hostile), encoding="utf-8")
    window.log("performance"), window.log("browser")
    window.open(file)
    window.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert window.evaluate("return typeof window.attacked") == "undefined"
    foreign = "iframe, img, link, base, meta[http-equiv=refresh], [onerror], [onload], [ontoggle]"
    assert window.evaluate(f"return document.querySelectorAll('{foreign}').length") == 0
    assert window.evaluate("return document.querySelectorAll('script').length") == 2
    shown = window.evaluate("return document.querySelector('.found[open] .question').textContent")
    assert "window.attacked=1" in shown
    assert _requests(window) == [file.as_uri()]
    assert window.log("browser") == []


def test_the_attacks_would_be_seen(window: Browser, tmp_path: Path) -> None:
    """The same text as markup, without a policy: the mark appears, and so does a request."""
    file = tmp_path / "naked.html"
    file.write_text(
        f"<!doctype html><title>x</title><style>a{{}}</style><body>{' '.join(ATTACKS[:-1])}"
    )
    window.log("performance")
    window.open(file)
    assert window.evaluate("return window.attacked") == 1
    assert len(_requests(window)) > 1


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_the_page_fits_and_is_silent(
    window: Browser, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    """No sideways scrolling, no word on the console, the colours of the scheme, and text that can
    be read.
    """
    window.resize(width, 900, dark=dark)
    window.log("browser")
    window.open(page)
    assert window.evaluate("return document.documentElement.scrollWidth") == width
    background = window.evaluate("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 382) == dark
    assert window.log("browser") == []
    assert window.evaluate(CONTRAST) == []
    height = window.evaluate("return document.documentElement.scrollHeight")
    window.resize(width, height, dark=dark)
    picture = window.screenshot()
    assert picture.startswith(b"\x89PNG")
    folder = Path(os.environ.get("RACDEPLOY_SCREENSHOTS", tmp_path))
    (folder / f"report-{width}-{'dark' if dark else 'light'}.png").write_bytes(picture)


def test_the_keyboard_reaches_search_prompts_and_thoughts(window: Browser, page: Path) -> None:
    """/ to the search, words, j to a prompt, Enter opens it: both thoughts side by side."""
    window.resize(1280, 900)
    window.open(page)
    assert window.evaluate(STATE) == "1–6 of 6 prompts"

    window.press("/")
    assert window.evaluate("return document.activeElement.id") == "browse-search"
    window.press(*"has 63 apples")
    wait_for(lambda: window.evaluate(STATE) == "1–1 of 1 prompts", "the prompt that was searched")

    window.evaluate("document.activeElement.blur()")
    window.press("j", ENTER)
    assert window.evaluate("return document.querySelector('.found').open")
    left, right = window.evaluate(
        "return [...document.querySelectorAll('.found[open] .side')]"
        ".map(side => side.getBoundingClientRect().top)"
    )
    assert left == right
    window.press(TAB)
    assert (
        window.evaluate("return document.activeElement.ariaLabel") == "thinking of the dense model"
    )


def test_prompts_are_filtered_ordered_and_turned_by_pages(window: Browser, page: Path) -> None:
    """Who was right, task, and how long: each choice says how many there are."""
    window.open(page)
    for control, value, expected in (
        ("show", "won", "1–2 of 2 prompts"),
        ("show", "all", "1–20 of 256 prompts"),
        ("task", "gcd", "1–20 of 26 prompts"),
        ("think", "open", "No prompt matches."),
        ("task", "", "1–1 of 1 prompts"),
    ):
        window.evaluate(
            f"const own = document.getElementById('browse-{control}'); own.value = '{value}';"
            "own.dispatchEvent(new Event('change'))"
        )
        assert window.evaluate(STATE) == expected

    window.evaluate("document.getElementById('clear').click()")
    assert window.evaluate(STATE) == "1–6 of 6 prompts"
    window.evaluate(
        "const own = document.getElementById('browse-show'); own.value = 'all';"
        "own.dispatchEvent(new Event('change'))"
    )
    window.press("n")
    assert window.evaluate(STATE) == "21–40 of 256 prompts"
    window.press("p")
    assert window.evaluate(STATE) == "1–20 of 256 prompts"

    ratios = window.evaluate(
        "const own = document.getElementById('browse-order'); own.value = 'longer';"
        "own.dispatchEvent(new Event('change'));"
        "return [...document.querySelectorAll('.lengths')].map(text =>"
        "  text.textContent.match(/\\d+/g).map(Number)).map(([a, b]) => (b + 1) / (a + 1))"
    )
    assert ratios == sorted(ratios, reverse=True)


def test_a_point_of_the_chart_opens_its_prompt(window: Browser, page: Path) -> None:
    """A click on prompt 19 shows it alone, opened."""
    window.open(page)
    window.evaluate(
        "document.querySelector('.dot[data-prompt=\"19\"]').dispatchEvent(new Event('click'))"
    )
    opened = window.evaluate(
        "return [...document.querySelectorAll('.found')]"
        ".map(part => [part.dataset.prompt, part.open])"
    )
    assert opened == [["19", True]]


def test_without_a_script_the_first_prompts_can_be_read(window: Browser, page: Path) -> None:
    """What needs the script is not shown."""
    window.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        window.open(page)
        shown = "return [...document.querySelectorAll('{}')].filter(one => one.offsetHeight).length"
        assert window.evaluate(shown.format("details.found")) == 6
        assert window.evaluate(shown.format("button, form, .scripted, #pager")) == 0
        assert "step by step" in window.evaluate(
            "return document.querySelector('details.found pre').textContent"
        )
    finally:
        window.devtools("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_everything_is_open(window: Browser, page: Path) -> None:
    """Disclosures with what is inside, no box that scrolls, white in the dark; then as before."""
    window.resize(1280, 900, dark=True)
    window.open(page)
    window.evaluate("dispatchEvent(new Event('beforeprint'))")
    window.devtools("Emulation.setEmulatedMedia", media="print")
    closed = "return document.querySelectorAll('details:not([open])').length"
    assert window.evaluate(closed) == 0
    assert window.evaluate("return document.querySelectorAll('.found .side').length") == 12
    cut = (
        "return [...document.querySelectorAll('pre, .scroll')].filter("
        "  one => one.scrollHeight > one.clientHeight + 2).length"
    )
    assert window.evaluate(cut) == 0
    ink = window.evaluate("return getComputedStyle(document.body).color")
    assert sum(map(int, ink[4:-1].split(","))) < 382

    window.devtools("Emulation.setEmulatedMedia", media="")
    window.evaluate("dispatchEvent(new Event('afterprint'))")
    assert window.evaluate(closed) > 6


def test_tables_that_are_too_wide_say_so(window: Browser, page: Path) -> None:
    """On a phone, where four models do not fit beside each other; not on a wide screen."""
    hints = "return [...document.querySelectorAll('.hint')].filter(one => one.offsetHeight).length"
    window.resize(390, 844)
    window.open(page)
    assert window.evaluate(hints) >= 1
    window.resize(1280, 900)
    window.open(page)
    assert window.evaluate(hints) == 0


def test_five_thousand_prompts_are_searched(
    window: Browser, report: Report, records: list[AnswerRecord], tmp_path: Path
) -> None:
    """Drawn a page at a time: the document stays small."""
    many = [
        record.model_copy(update={"prompt": 256 * turn + record.prompt})
        for turn in range(20)
        for record in records
    ][: 2 * 5000]
    file = tmp_path / "many.html"
    file.write_text(html.render(report, many), encoding="utf-8")
    window.open(file)
    assert window.evaluate("return document.querySelectorAll('.found').length") == 20
    window.press("/", *"#4999")
    wait_for(lambda: window.evaluate(STATE) == "No prompt matches.", "a search without a result")
    window.evaluate(
        "const own = document.getElementById('browse-show'); own.value = 'all';"
        "own.dispatchEvent(new Event('change'))"
    )
    assert window.evaluate(STATE) == "1–1 of 1 prompts"


def test_every_part_has_an_accessible_name(window: Browser, page: Path) -> None:
    """As Chromium's accessibility tree names them: pictures, regions, groups of choices, links."""
    window.open(page)
    window.devtools("Accessibility.enable")
    nodes = window.devtools("Accessibility.getFullAXTree")["nodes"]
    named_roles = {"image", "region", "link", "button", "combobox", "searchbox"}
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and node.get("role", {}).get("value") in named_roles
        and not node.get("name", {}).get("value")
    ]
    named = {node["role"]["value"] for node in nodes if node.get("name", {}).get("value")}
    assert nameless == []
    assert named_roles | {"navigation"} <= named


# Text whose contrast with what is behind it is below the 4.5 of WCAG AA.
CONTRAST = """
const parse = colour => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = node => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const bad = [];
for (const node of document.querySelectorAll('body *')) {
  const words = [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
  if (node.closest('svg') || !words) continue;
  const own = light(parse(getComputedStyle(node).color));
  const pair = [own, light(behind(node))].sort((a, b) => b - a);
  const ratio = (pair[0] + .05) / (pair[1] + .05);
  if (ratio < 4.5) bad.push(`${node.className || node.tagName}: ${ratio.toFixed(2)}`);
}
return [...new Set(bad)];
"""

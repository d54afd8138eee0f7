"""The page in a real browser: nothing runs, nothing is fetched, and everything can be reached by
keyboard.

Slow because it needs Chromium and chromedriver, which a bare machine does not have: ``apt-get
install chromium chromium-driver``, then ``pytest -m slow tests/report/test_browser.py``. The
pictures are kept in the folder that ``RACDEPLOY_SCREENSHOTS`` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from racdeploy.report import html
from racdeploy.report.model import Record, Report
from tests.support.browser import CHROMIUM, DRIVER, Browser, browser

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
TAB, ENTER, RIGHT = "\ue004", "\ue007", "\ue014"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(report: Report, records: list[Record], tmp_path: Path) -> Path:
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
    window: Browser, report: Report, records: list[Record], tmp_path: Path
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
    assert (
        window.evaluate(
            "return document.querySelectorAll('script, iframe, img, link, [onerror]').length"
        )
        == 0
    )
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


def test_the_keyboard_reaches_filters_and_thoughts(window: Browser, page: Path) -> None:
    """Tab to the filter, arrow to the next choice, tab to a prompt, Enter opens it: both thoughts
    side by side.
    """
    window.resize(1280, 900)
    window.open(page)
    window.evaluate("document.getElementById('show-all').focus()")
    window.press(RIGHT)
    shown = (
        "return [...document.querySelectorAll('.found')].filter(part => part.offsetHeight).length"
    )
    assert window.evaluate(shown) == 4
    window.press(TAB, TAB, ENTER)
    opened = window.evaluate(
        "return [...document.querySelectorAll('.found')].map(part => part.open)"
    )
    assert opened == [True] + [False] * 5
    left, right = window.evaluate(
        "return [...document.querySelectorAll('.found[open] .side')]"
        ".map(side => side.getBoundingClientRect().top)"
    )
    assert left == right
    window.press(TAB)
    assert (
        window.evaluate("return document.activeElement.ariaLabel") == "thinking of the dense model"
    )


def test_every_part_has_an_accessible_name(window: Browser, page: Path) -> None:
    """As Chromium's accessibility tree names them: pictures, regions, groups of choices, links."""
    window.open(page)
    window.devtools("Accessibility.enable")
    nodes = window.devtools("Accessibility.getFullAXTree")["nodes"]
    roles = {"image", "region", "radio", "link", "navigation", "list", "table", "heading", "group"}
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and node.get("role", {}).get("value") in {"image", "region", "radio", "link"}
        and not node.get("name", {}).get("value")
    ]
    named = {node["role"]["value"] for node in nodes if node.get("name", {}).get("value")}
    assert nameless == []
    assert {"image", "region", "radio", "link", "navigation"} <= named & roles


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

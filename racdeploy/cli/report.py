"""The command ``report``, which opens the report of a bundle or a search in a browser."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from pathlib import Path

import typer

from racdeploy.cli.console import err, print_json, say, show
from racdeploy.cli.options import JsonOpt


def report(
    bundle: Path = typer.Argument(help="Bundle folder, folder of verify --reports, or tune.json."),
    open_page: bool | None = typer.Option(
        None,
        "--open/--no-open",
        metavar="",
        help="Open the page; default: if there is a display.",
    ),
    json_output: JsonOpt = False,
) -> None:
    """Open the report of a bundle or a search in a browser, and print its path."""
    wanted = open_page
    if open_page is None:  # without a display, Linux may start a text browser
        displays = os.environ.get("DISPLAY"), os.environ.get("WAYLAND_DISPLAY")
        wanted = sys.platform == "darwin" or any(displays)
    if bundle.suffix == ".json" and not bundle.is_dir():
        page, verdict = _draw_search(bundle, json_output)
    else:
        page, verdict = _find_report(bundle, json_output)

    opened = wanted and webbrowser.open(page.as_uri())
    if json_output:
        print_json({"page": str(page), "verdict": verdict, "opened": opened})
        return

    show(str(page))
    if open_page and not opened:
        say("no browser could be started: open the file by hand", "yellow")


def _find_report(bundle: Path, json_output: bool) -> tuple[Path, str]:
    """Return the page of a bundle and its verdict; print the verdict."""
    from racdeploy.manifest import MANIFEST_NAME
    from racdeploy.report.files import PAGE, read_records, read_report, require_report
    from racdeploy.report.html import render
    from racdeploy.report.terminal import print_verdict

    require_report(bundle)
    page, report = bundle / PAGE, read_report(bundle)
    if (bundle / MANIFEST_NAME).is_file() or not page.is_file():
        page = _draw(page, render(report, read_records(bundle), bundle.resolve().name))
    if not json_output:
        print_verdict(report, err)
    return page.resolve(), report.verdict


def _draw_search(file: Path, json_output: bool) -> tuple[Path, str]:
    """Render the page of a search from its JSON; return it with the verdict."""
    from racdeploy.report import tuning_page
    from racdeploy.report.terminal import print_tuning
    from racdeploy.report.tuning_files import read_tuning

    tuning = read_tuning(file)
    page = _draw(file.with_suffix(".html"), tuning_page.render(tuning))
    if not json_output:
        print_tuning(tuning, err)
    return page.resolve(), tuning.verdict


def _draw(page: Path, text: str) -> Path:
    """Return a page with this text, elsewhere if another is there: scripts may be in it."""
    from racdeploy.files.writing import write_atomic

    content = text.encode()
    if page.is_file() and page.stat().st_size == len(content) and page.read_bytes() == content:
        return page
    if os.path.lexists(page):
        page = Path(tempfile.mkdtemp()) / page.name
    write_atomic(page, content)
    return page

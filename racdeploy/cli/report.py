"""The command that shows the report of a bundle, or of a search, in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

import typer

from racdeploy.cli.console import err, print_json, reported, show
from racdeploy.cli.options import JsonOpt


@reported
def report(
    bundle: Path = typer.Argument(
        help="Bundle folder, one that verify --reports wrote, or a tune.json."
    ),
    open_page: bool | None = typer.Option(
        None,
        "--open/--no-open",
        metavar="",
        help="Open the page; default: where there is a display.",
    ),
    json_output: JsonOpt = False,
) -> None:
    """Open the report of a bundle or a search in the browser, and print where it is."""
    wanted = _has_display() if open_page is None else open_page
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
        err.print("no browser could be started: open the file by hand", style="yellow")


def _find_report(bundle: Path, json_output: bool) -> tuple[Path, str]:
    """Return the page of a bundle and its verdict, which is printed."""
    from racdeploy.report.files import find_page, read_report
    from racdeploy.report.terminal import print_verdict

    page = find_page(bundle).resolve()
    found = read_report(bundle)
    if not json_output:
        print_verdict(found, err)
    return page, found.verdict


def _draw_search(file: Path, json_output: bool) -> tuple[Path, str]:
    """Draw the page again: the data is what the search found, and the page follows from it."""
    from racdeploy.bundles.signature import SIGNATURE_NAME
    from racdeploy.files.writing import write_atomic
    from racdeploy.report import tuning_page
    from racdeploy.report.terminal import print_tuning
    from racdeploy.report.tuning_files import name_page, read_tuning

    tuning = read_tuning(file)
    page = name_page(file).resolve()
    # Of a signed bundle no file may change.
    if not (page.is_file() and file.with_name(SIGNATURE_NAME).exists()):
        write_atomic(page, tuning_page.render(tuning))
    if not json_output:
        print_tuning(tuning, err)
    return page, tuning.verdict


def _has_display() -> bool:
    """Return whether a browser has where to open; without one, Linux may start one in text."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))

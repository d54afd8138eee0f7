"""The command that shows the report of a bundle in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

import typer

from racdeploy.cli.console import err, out, print_json, reported
from racdeploy.cli.options import JsonOpt


@reported
def report(
    bundle: Path = typer.Argument(help="Bundle folder, or one that verify --reports wrote."),
    open_page: bool | None = typer.Option(
        None,
        "--open/--no-open",
        metavar="",
        help="Open the page; default: where there is a display.",
    ),
    json_output: JsonOpt = False,
) -> None:
    """Open the report of a bundle in the browser, and print where it is."""
    from racdeploy.report.files import find_page, read_report
    from racdeploy.report.terminal import print_verdict

    page = find_page(bundle).resolve()
    found = read_report(bundle)
    wanted = _has_display() if open_page is None else open_page
    opened = wanted and webbrowser.open(page.as_uri())

    if json_output:
        print_json({"page": str(page), "verdict": found.verdict, "opened": opened})
        return

    print_verdict(found, err)
    out.print(str(page), markup=False, soft_wrap=True)
    if open_page and not opened:
        err.print("no browser could be started: open the file by hand", style="yellow")


def _has_display() -> bool:
    """Return whether a browser has where to open; without one, Linux may start one in text."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))

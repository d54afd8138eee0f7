"""Commands that push a bundle into a repository of the Hub, and pull one out of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from racdeploy.cli.console import err, out, print_json, print_notes, reported, say, show
from racdeploy.cli.options import BundleArg, JsonOpt, QuietOpt, flag

if TYPE_CHECKING:
    from racdeploy.bundles.hub.push import Push

_REPOSITORY = typer.Argument(metavar="ORG/NAME", help="Repository of the Hub.")


@reported
def push(
    bundle: BundleArg,
    repository: str = _REPOSITORY,
    dry_run: bool = flag("--dry-run", "Show files, card and address; write nothing."),
    private: bool = flag("--private", "Make a new repository private."),
    revision: str = typer.Option("", help="Branch to write to; default: main."),
    message: str = typer.Option("", help="Message of the commit."),
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Push a bundle to the Hub, beside other bundles of the same repository."""
    from racdeploy.bundles.hub.push import plan_push
    from racdeploy.bundles.hub.push import push as push_planned

    _hide_bars(quiet)
    planned = plan_push(bundle, repository, revision, blind=dry_run)
    print_notes(planned.notes)

    commit = ""
    if not dry_run:
        commit = push_planned(planned, message=message, private=private)

    if json_output:
        files = [{"path": path, "size_bytes": size} for path, size in planned.sizes.items()]
        described = {"url": planned.remote.url, "commit": commit, "bundle": planned.bundle}
        listed = {"files": files, "removed": list(planned.removed), "card": planned.card}
        print_json({**described, **listed})
        return

    if dry_run:
        _show(planned)
        err.print("nothing was written; without --dry-run this is pushed to the address above")
    else:
        show(planned.remote.url)
        pull_line = f"racdeploy pull {repository} --quant {planned.bundle} --out bundle"
        say(f"next: {pull_line}")


@reported
def pull(
    repository: str = _REPOSITORY,
    quant: str = typer.Option("", help="Number format or name, where there are several bundles."),
    out_folder: Path | None = typer.Option(
        None, "--out", "-o", help="Folder to write; default: NAME of the repository."
    ),
    revision: str = typer.Option("", help="Branch, tag or commit; default: main."),
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Pull a bundle from the Hub, and check every file that its manifest names."""
    from racdeploy.bundles.hub.pull import pull as pull_bundle
    from racdeploy.report.tables import readable_bytes

    _hide_bars(quiet)
    pulled = pull_bundle(repository, out_folder, quant=quant, revision=revision)

    if json_output:
        place = {"path": str(pulled.folder), "bundle": pulled.bundle}
        print_json({**place, "commit": pulled.commit, "size_bytes": pulled.size_bytes})
        return

    show(pulled.folder)
    size = readable_bytes(pulled.size_bytes)
    say(f"{pulled.bundle}, {size}, as its manifest says; next: racdeploy verify {pulled.folder}")


def _show(planned: Push) -> None:
    """Print what would be pushed: files with sizes, the card, and the address last."""
    from racdeploy.report.tables import readable_bytes

    # Sizes first: paths are long, and beside them a size would be broken.
    rows = {path: readable_bytes(size_bytes) for path, size_bytes in planned.sizes.items()}
    rows |= dict.fromkeys(planned.removed, "removed")
    for path, size in rows.items():
        show(f"{size:>8}  {path}")

    total_bytes = sum(planned.sizes.values())
    out.print(f"{len(planned.sizes)} files, {readable_bytes(total_bytes)}\n")
    if planned.card:
        show(planned.card)
    show(planned.remote.url)


def _hide_bars(quiet: bool) -> None:
    """Leave the client's bars to terminals; it asks this when it is imported."""
    if quiet or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

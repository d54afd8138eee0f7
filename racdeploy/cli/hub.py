"""Commands that push bundles to the Hugging Face Hub and pull them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from racdeploy.cli.console import out, print_json, print_notes, say, show
from racdeploy.cli.options import BundleArg, JsonOpt, QuietOpt, flag

if TYPE_CHECKING:
    from racdeploy.bundles.hub.push import PushPlan

_REPOSITORY = typer.Argument(metavar="ORG/NAME", help="Repository of the Hub.")


def push(
    bundle: BundleArg,
    repository: str = _REPOSITORY,
    dry_run: bool = flag("--dry-run", "Print files, card and address; push nothing."),
    private: bool = flag("--private", "Make a new repository private."),
    revision: str = typer.Option("", help="Branch to write to; default: main."),
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Push a bundle to the Hub; a repository can have several bundles."""
    from racdeploy.bundles.hub.push import plan_push
    from racdeploy.bundles.hub.push import push as push_planned

    _hide_bars(quiet)
    planned = plan_push(bundle, repository, revision, ignore_unreachable=dry_run)
    print_notes(planned.notes)

    commit = "" if dry_run else push_planned(planned, private=private)

    if json_output:
        files = [{"path": path, "size_bytes": size} for path, size in planned.sizes.items()]
        print_json(
            {
                "url": planned.remote.url,
                "commit": commit,
                "bundle": planned.bundle,
                "files": files,
                "removed": list(planned.removed),
                "card": planned.card,
            }
        )
        return

    if dry_run:
        _show(planned)
        say("nothing was written; without --dry-run this is pushed to the address above")
    else:
        show(planned.remote.url)
        say(f"next: racdeploy pull {repository} --quant {planned.bundle}")


def pull(
    repository: str = _REPOSITORY,
    quant: str = typer.Option("", help="Number format or name, if there are several bundles."),
    out_folder: Path | None = typer.Option(
        None, "--out", "-o", help="Folder to write; default: NAME of the repository."
    ),
    revision: str = typer.Option("", help="Branch, tag or commit; default: main."),
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Pull a bundle from the Hub and check its files against the manifest."""
    from racdeploy.bundles.hub.pull import pull as pull_bundle
    from racdeploy.report.tables import format_bytes

    _hide_bars(quiet)
    pulled = pull_bundle(repository, out_folder, quant=quant, revision=revision)

    if json_output:
        print_json(
            {
                "path": str(pulled.folder),
                "bundle": pulled.bundle,
                "commit": pulled.commit,
                "size_bytes": pulled.size_bytes,
            }
        )
        return

    show(pulled.folder)
    size = format_bytes(pulled.size_bytes)
    say(f"{pulled.bundle}, {size}, as its manifest says; next: racdeploy verify {pulled.folder}")


def _show(planned: PushPlan) -> None:
    """Print a plan: files with sizes, the card, and the address last."""
    from racdeploy.report.tables import format_bytes

    # Sizes first: after a long path, a size would be wrapped.
    rows = {path: format_bytes(size_bytes) for path, size_bytes in planned.sizes.items()}
    rows |= dict.fromkeys(planned.removed, "removed")
    for path, size in rows.items():
        show(f"{size:>8}  {path}")

    total_bytes = sum(planned.sizes.values())
    out.print(f"{len(planned.sizes)} files, {format_bytes(total_bytes)}\n")
    if planned.card:
        show(planned.card)
    show(planned.remote.url)


def _hide_bars(quiet: bool) -> None:
    """Turn off the Hub client's bars without a terminal; it reads this when imported."""
    if quiet or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

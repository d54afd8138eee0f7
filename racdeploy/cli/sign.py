"""The command ``sign``, which signs a finished bundle."""

from __future__ import annotations

from pathlib import Path

import typer

from racdeploy.cli.console import print_json, say, show
from racdeploy.cli.options import BundleArg, JsonOpt, flag
from racdeploy.errors import UsageError


def sign(
    bundle: BundleArg,
    key: Path | None = typer.Option(None, help="PEM file of the private key to sign with."),
    keyless: bool = flag(
        "--keyless", "Sign with sigstore, as this workflow or a person who logs in."
    ),
    signature: Path | None = typer.Option(
        None, help="File to write; default: model.sig in the bundle."
    ),
    json_output: JsonOpt = False,
) -> None:
    """Sign all files of a bundle, so that verify detects changed or added ones."""
    from racdeploy.bundles.signature import sign as write_signature

    if keyless == (key is not None):
        raise UsageError(
            "key-or-keyless",
            "a bundle is signed with a key or by sigstore",
            remedy="give --key FILE, or --keyless; docs/publish.md has both",
        )

    written = write_signature(bundle, signature, key)
    if json_output:
        print_json({"path": str(written)})
        return

    show(written)
    whose = "--public-key KEY.pub" if key else "--identity WHO --issuer URL"
    named = f" --signature {written}" if signature else ""
    say(f"next: racdeploy verify {bundle}{named} {whose}")

"""The command that signs a finished bundle."""

from __future__ import annotations

from pathlib import Path

import typer

from racdeploy.cli.console import print_json, reported, say, show
from racdeploy.cli.options import BundleArg, JsonOpt, flag
from racdeploy.errors import UsageError


@reported
def sign(
    bundle: BundleArg,
    key: Path | None = typer.Option(None, help="PEM file of the private key to sign with."),
    keyless: bool = flag("--keyless", "Sign as this workflow, or as who logs in, at sigstore."),
    signature: Path | None = typer.Option(
        None, help="File to write; default: model.sig in the bundle."
    ),
    json_output: JsonOpt = False,
) -> None:
    """Sign every file of a bundle, so that a changed or added one is found."""
    from racdeploy.bundles.signature import sign as write_signature

    if keyless == (key is not None):
        raise UsageError(
            "key-or-keyless",
            "a bundle is signed with a key or by sigstore",
            remedy="give --key FILE, or --keyless; docs/signatures.md has both",
        )

    place = write_signature(bundle, signature, key)
    if json_output:
        print_json({"path": str(place)})
        return

    show(place)
    whose = "--public-key KEY.pub" if key else "--identity WHO --issuer URL"
    named = f" --signature {place}" if signature else ""
    say(f"next: racdeploy verify {bundle}{named} {whose}")

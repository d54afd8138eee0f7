"""The command that verifies a finished bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import typer

from racdeploy.cli.console import err, finish, print_notes, print_plan, reported
from racdeploy.cli.options import (
    AccelOpt,
    BundleArg,
    GateOpt,
    JsonOpt,
    ThreadsOpt,
    TierOpt,
    WorkOpt,
    flag,
)
from racdeploy.errors import UsageError

_SERVER, _HARNESS = "A server instead of the artifact", "An evaluation harness, too"
_SIGNATURE = "A signature first"
Questions = Literal["chat", "completions"]
"""As bundles.server_answers.ServerApi, whose import takes longer."""


@reported
def verify(
    bundle: BundleArg,
    gate: GateOpt = None,
    tier: TierOpt = "",
    baseline: Path | None = typer.Option(
        None, help="Dense artifact to run too, or another bundle of the same dense model."
    ),
    server: str = typer.Option(
        "",
        help="Verify what this OpenAI-compatible API serves, http://HOST:PORT/v1.",
        rich_help_panel=_SERVER,
    ),
    server_model: str = typer.Option(
        "", help="Name that the server gives the model.", rich_help_panel=_SERVER
    ),
    server_key_env: str = typer.Option(
        "", help="Environment variable that holds the server's key.", rich_help_panel=_SERVER
    ),
    server_api: Questions = typer.Option(
        "chat",
        help="chat asks as users do; completions sends token ids.",
        rich_help_panel=_SERVER,
    ),
    server_timeout: float = typer.Option(
        1800.0,
        min=0.1,
        metavar="SECONDS",
        help="Longest wait for one of its answers.",
        rich_help_panel=_SERVER,
    ),
    harness: str = typer.Option(
        "",
        help="Harness that asks both models: lm-eval or lighteval.",
        rich_help_panel=_HARNESS,
    ),
    harness_tasks: str = typer.Option(
        "",
        metavar="NAMES",
        help="Tasks that it knows, with commas between them.",
        rich_help_panel=_HARNESS,
    ),
    harness_limit: int = typer.Option(
        0, min=0, help="Documents of each task; 0 asks all.", rich_help_panel=_HARNESS
    ),
    harness_include: Path | None = typer.Option(
        None,
        help="More tasks: a folder for lm-eval, a Python file for lighteval.",
        rich_help_panel=_HARNESS,
    ),
    harness_python: Path | None = typer.Option(
        None,
        help="Python that has it; default: the one of racdeploy.",
        rich_help_panel=_HARNESS,
    ),
    signature: Path | None = typer.Option(
        None,
        help="Signature over the bundle; default: model.sig in it.",
        rich_help_panel=_SIGNATURE,
    ),
    public_key: Path | None = typer.Option(
        None, help="PEM file of the key that it must be of.", rich_help_panel=_SIGNATURE
    ),
    identity: str = typer.Option(
        "",
        metavar="WHO",
        help="Or who must have signed at sigstore: a workflow, or an address.",
        rich_help_panel=_SIGNATURE,
    ),
    issuer: str = typer.Option(
        "", metavar="URL", help="Provider of that identity.", rich_help_panel=_SIGNATURE
    ),
    show_plan: bool = flag("--plan", "Print what the run can show, and do nothing."),
    work: WorkOpt = None,
    accel: AccelOpt = "auto",
    junit_file: Path | None = typer.Option(None, "--junit", help="JUnit XML to write."),
    html_file: Path | None = typer.Option(None, "--html", help="HTML report to write."),
    reports: Path | None = typer.Option(None, help="Folder for the report in every form."),
    exit_zero: bool = flag("--exit-zero", "Report only: a verdict is no exit code."),
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Rerun the bundle's prompts on its artifact and compare with the dense records in it."""
    from racdeploy.bundles.bundle import Bundle
    from racdeploy.bundles.harness import HarnessComparison
    from racdeploy.bundles.server_answers import ServerAnswerer
    from racdeploy.bundles.verify import ArtifactAnswerer, Reverification
    from racdeploy.cli.progress import show_progress
    from racdeploy.files.caches import default_work
    from racdeploy.files.writing import make_parent, write_atomic
    from racdeploy.report import html, junit
    from racdeploy.report.files import write_reports

    belongs = {
        "--server": (server, (server_model, server_key_env)),
        "--harness": (harness, (harness_tasks, harness_limit, harness_include, harness_python)),
    }
    _refuse_mixed(belongs)
    _check_signature(bundle, signature, public_key, identity, issuer)

    with show_progress(err) as progress:
        judged = Bundle(bundle, gate, tier)
        mode = "off" if server else accel
        local = ArtifactAnswerer(judged, work or default_work(), threads, mode, progress)
        asked = ServerAnswerer(
            local, server, server_model, server_key_env, server_api, server_timeout
        )
        tasks = tuple(filter(None, harness_tasks.replace(" ", "").split(",")))
        where = (harness_include, harness_python, baseline)
        asker = HarnessComparison(local, harness, tasks, harness_limit, *where)

        others = (asked if server else None, baseline, asker if harness else None)
        again = Reverification(local, *others)
        if show_plan:
            print_plan(again.plan(), json_output)
            return

        again.plan()
        for file in filter(None, (junit_file, html_file)):
            make_parent(file)
        report, records = again.run()

    if junit_file:
        write_atomic(junit_file, junit.render(report))
    if html_file:
        write_atomic(html_file, html.render(report, records, str(bundle)))
    if reports:
        write_reports(reports, report, records, str(bundle))
    finish(report, json_output, (), again.gate, exit_zero)


def _check_signature(
    bundle: Path, signature: Path | None, public_key: Path | None, identity: str, issuer: str
) -> None:
    """Check the signature that is asked for, before anything of the bundle is read."""
    if not (signature or public_key or identity or issuer):
        return

    if bool(public_key) == bool(identity) or bool(identity) != bool(issuer):
        raise UsageError(
            "key-or-identity",
            "a signature is compared with one key, or with one identity and its issuer",
            remedy="give --public-key FILE, or --identity WHO --issuer URL; see docs/signatures.md",
        )

    from racdeploy.bundles.signature import SIGNATURE_NAME, Signatory, check_signature

    signatory = Signatory(public_key, identity, issuer)
    check_signature(bundle, signature or bundle / SIGNATURE_NAME, signatory)
    print_notes([f"every file of {bundle} is as {signatory} signed it"])


def _refuse_mixed(belongs: Mapping[str, tuple[str, Sequence[object]]]) -> None:
    """Refuse options without the one that they belong to, and both of those together."""
    for option, (value, own) in belongs.items():
        if not value and any(own):
            raise UsageError(
                "missing-main-option",
                f"options that begin with {option}- belong to {option}",
                remedy=f"add {option}, see racdeploy verify --help",
            )

    if all(value for value, _ in belongs.values()):
        raise UsageError(
            "harness-with-server",
            "--harness asks the bundle's own models, which are served for it",
            remedy="leave out --server, or --harness",
        )

"""Verify a bundle, or compare model files with a reference, as a step of a workflow: run
racdeploy, then tell the outputs and the job summary.

The exit code is an output, so that the comment and the artifacts follow before the job is failed
with it. Settings come in the environment, never as text in a shell line: a name of a branch or a
file cannot become a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_NO_VERDICT = 4  # where racdeploy ended well and decided nothing: the job must not pass
_SUMMARY_BYTES = 1_000_000  # GitHub takes 1 MiB
_VERDICTS = ("pass", "inconclusive", "fail")  # from best to worst


def main() -> None:
    """Run racdeploy, and write GITHUB_OUTPUT and GITHUB_STEP_SUMMARY."""
    reports = Path(os.environ["RACDEPLOY_REPORTS"])
    # One of an earlier run must not speak for a run that breaks off.
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    _warn_of_token(Path.cwd() / ".git")
    candidates = _candidates()
    with _no_commands():
        done = subprocess.run(_command(reports, candidates), capture_output=True, text=True)
        sys.stdout.write(done.stdout)
        sys.stdout.flush()
        sys.stderr.write(done.stderr)
        sys.stderr.flush()

    # A comparison writes a folder for each candidate.
    found = {
        file.parent: json.loads(file.read_text(encoding="utf-8"))["verdict"]
        for file in sorted(reports.glob("*/report.json" if candidates else "report.json"))
    }
    decided = done.returncode in (0, 1, 3) and len(found) == max(1, len(candidates))
    verdict = max(found.values(), key=_VERDICTS.index) if decided else "error"
    if len(found) == 1:
        (reports,) = found
    if not decided:
        summary = _failed(done.returncode, done.stderr)
    elif len(found) == 1:
        summary = _read(reports)
    else:
        worst_first = sorted(found, key=lambda folder: -_VERDICTS.index(found[folder]))
        summary = "\n\n".join([done.stdout.strip(), *map(_read, worst_first)])

    code = done.returncode if decided else done.returncode or _NO_VERDICT
    _append("GITHUB_OUTPUT", f"verdict={verdict}\nexit-code={code}\nreports={reports}\n")
    _append("GITHUB_STEP_SUMMARY", summary.encode()[:_SUMMARY_BYTES].decode(errors="ignore"))
    (reports / "report.md").write_text(summary, encoding="utf-8")


def _candidates() -> list[str]:
    """Return the models to compare, one a line; none where there is a bundle."""
    lines = os.environ.get("RACDEPLOY_CANDIDATE", "").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


def _command(reports: Path, candidates: list[str]) -> list[str]:
    options = {"gate": "gate", "tier": "tier", "threads": "threads"}
    options |= (
        {"reference": "against"}
        if candidates
        else {"server": "server", "server-model": "server-model"}
    )
    command = ["racdeploy", "compare" if candidates else "verify", "--reports", str(reports)]
    if len(candidates) > 1:
        command.append("--card")  # prints the table of all
    for name, option in options.items():
        if value := os.environ.get(f"RACDEPLOY_{name.upper().replace('-', '_')}", ""):
            command += [f"--{option}", value]
    return [*command, "--", *(candidates or [os.environ["RACDEPLOY_BUNDLE"]])]


def _warn_of_token(folder: Path) -> None:
    """Warn where actions/checkout left its token beside native code that reads a stranger's file.

    Source: actions/checkout, persist-credentials; from version 6 on the token is in another file.
    """
    config = folder / "config"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    if "extraheader" in text.lower() or "git-credentials-" in text:
        print(
            "::warning::.git/config leads to this job's token, which an engine could read: give "
            "actions/checkout `persist-credentials: false`",
            flush=True,
        )


@contextlib.contextmanager
def _no_commands() -> Iterator[None]:
    """Let the runner take no line for a command: a bundle's texts are printed in between.

    Source: docs.github.com, workflow commands, stopping and starting workflow commands.
    """
    word = secrets.token_hex(16)
    print(f"::stop-commands::{word}", flush=True)
    try:
        yield
    finally:
        print(f"\n::{word}::", flush=True)


def _failed(code: int, said: str) -> str:
    """Return Markdown that says why there is no report; what racdeploy said is shown as it is."""
    text = said.strip()[-4000:].replace("```", "'''") or "nothing"
    return f"### ⚠️ racdeploy ended with exit code {code} and no verdict\n\n```\n{text}\n```\n"


def _append(name: str, text: str) -> None:
    with Path(os.environ[name]).open("a", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()

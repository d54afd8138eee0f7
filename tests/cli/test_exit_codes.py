"""How the command line ends where nobody reads what it prints, or where it was typed wrongly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.api.records import Bundle, Verdict
from racdeploy.cli import compare, console
from racdeploy.cli.app import app
from racdeploy.verification.gate import read_gate
from tests.support.records import record
from tests.support.sample_report import build_report
from tests.support.tiny_artifacts import make_bundle

COMMANDS = (["--help"], ["plugins"], ["plugins", "--json"], ["build", "--help"])


def _run(arguments: list[str], stdout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "racdeploy", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_closed_pipe_ends_it_as_every_unix_tool(arguments: list[str]) -> None:
    """Exit code 1 is a failed gate, and nothing else."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = _run(arguments, writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["plugins", "--json"], ["targets"], ["nothing", "--json"]])
def test_a_full_disk_under_stdout_is_an_error_of_the_machine(arguments: list[str]) -> None:
    """Also where the error itself was to be printed there."""
    full = os.open("/dev/full", os.O_WRONLY)
    ended = _run(arguments, full)
    os.close(full)
    assert ended.returncode == 4
    assert "[os-error]" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that Linux keeps")
@pytest.mark.parametrize("megabytes", [120, 160, 200])
def test_too_little_memory_to_import_numpy_is_no_failed_gate(megabytes: int) -> None:
    """OpenBLAS would end the process, with a code that means something else here."""
    limits = f"ulimit -v {1000 * megabytes}; exec {sys.executable} -m racdeploy inspect ."
    ended = subprocess.run(["bash", "-c", limits], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert "[address-space-too-small]" in ended.stderr


@pytest.mark.parametrize(
    "arguments", [["verify", "--tear", "smoke"], ["nothing"], ["run", "b", "q", "--seed", "-1"]]
)
def test_wrong_usage_is_json_where_json_was_asked_for(arguments: list[str]) -> None:
    ended = _run([*arguments, "--json"], subprocess.PIPE)
    printed = json.loads(ended.stdout)
    assert (ended.returncode, printed["exit_code"], printed["code"]) == (2, 2, "wrong-usage")
    assert printed["remedy"].endswith("--help")


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_after_a_fail_nothing_is_offered_for_use(
    verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to do about what was lost comes in place of ``serve``; exit code 1."""
    remedy = "lower the sparsity, or choose a wider quant"
    report = build_report()
    checks = [
        each.model_copy(update={"verdict": verdict, "remedy": remedy})
        for each in report.checks
        if each.name == "accuracy"
    ]
    report = report.model_copy(update={"verdict": verdict, "checks": tuple(checks)})
    report = report.model_copy(update={"recipe": {"model": "tiny-reasoner"}})
    (tmp_path / "records.jsonl").write_text(record(0).model_dump_json() + "\n", encoding="utf-8")
    made = Bundle.from_report(report, read_gate(), folder=tmp_path)

    monkeypatch.setattr(console, "call_with_progress", lambda function, values, quiet: made)
    ended = CliRunner().invoke(app, ["build", "--quiet"])
    assert ended.exit_code == (verdict == "fail"), ended.output
    assert ("racdeploy serve" in ended.output) == (verdict == "pass")
    assert (f"\n  accuracy: {remedy}" in ended.output) == (verdict == "fail")
    assert f"racdeploy report {tmp_path}" in ended.output


def test_every_output_is_tried_before_a_question_is_asked(tmp_path: Path) -> None:
    """A report that cannot be written would be noticed after all answers."""
    bundle = make_bundle(tmp_path / "made")
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for option, path in (("--junit", tmp_path), ("--html", below), ("--reports", below)):
        ended = _run(["verify", str(bundle), option, str(path)], subprocess.PIPE)
        assert (ended.returncode, ended.stdout) == (4, "")
        assert "[write-failed]" in ended.stderr
        assert "verify pruned" not in ended.stderr


@pytest.mark.parametrize(("codes", "code"), [((0, 0), 0), ((0, 3), 3), ((3, 1, 0), 1)])
def test_of_several_models_a_failure_counts_before_missing_data(
    codes: tuple[int, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Verdict.from_report(build_report(), read_gate())
    models = [replace(model, exit_code=each) for each in codes]
    monkeypatch.setattr(compare, "call_with_progress", lambda *arguments: models)

    asked = ["compare", "a.gguf", "--against", "b.gguf"]
    assert CliRunner().invoke(app, asked).exit_code == code
    assert CliRunner().invoke(app, [*asked, "--exit-zero"]).exit_code == 0

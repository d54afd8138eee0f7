"""``pytest --racdeploy-bundle`` as a user runs it, in its own process; the verification finds
what the test asks for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fork_server import fork_context

ROOT = Path(__file__).parents[2]
PLUGIN = "racdeploy.bundles.pytest_plugin"

# Stands in for the verification alone; gate, checks and report are the real ones.
CONFTEST = """
import os
from datetime import UTC, datetime
from types import SimpleNamespace
from racdeploy import plugins
import racdeploy
from racdeploy.bundles import verify
from racdeploy.errors import ArtifactError
from racdeploy.results.checks import CheckResult
from racdeploy.results.report import Report
from racdeploy.verification.gate import read_gate

wanted = dict(part.split("=") for part in os.environ["WANTED"].split(","))

def verified():
    open("verified", "a").write("x")
    if "error" in wanted:
        raise ArtifactError("bundle-damaged", "the bundle is damaged", remedy="copy it again")
    checks = tuple(
        CheckResult(name=name, verdict=wanted.get(name, wanted["rest"]),
                    summary=f"what {name} found", remedy="do this", figures={"number": 0.25})
        for name in plugins.list_names("checks")
    )
    return Report(created=datetime.now(UTC), model="m", target="t", checks=checks), []

class Verification:
    def __init__(self, bundle):
        self.gate = read_gate(bundle.gate_file).for_tier(bundle.tier)

    def run(self):
        return verified()

def compare(candidates, *, against, **options):
    open("compared", "w").write(f"{candidates} {against} {options['tier']}")
    return [SimpleNamespace(report=verified()[0])]

verify.BundleVerification = Verification
racdeploy.compare = compare
"""


@dataclass(frozen=True)
class Ended:
    """A run of pytest that has ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def _pytest(folder: Path, wanted: str, *arguments: str) -> Ended:
    """Run pytest in a process of its own, which is forked where pytest is imported already."""
    (folder / "conftest.py").write_text(CONFTEST)
    options = ["-p", PLUGIN, "-q", "-rA", "-c", os.devnull, "--rootdir", str(folder)]
    process = fork_context().Process(
        target=_run_pytest,
        args=(folder, wanted, [*options, "-p", "no:cacheprovider", *arguments]),
    )
    process.start()
    process.join()
    assert process.exitcode is not None
    written = [(folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return Ended(process.exitcode, *written)


def _run_pytest(folder: Path, wanted: str, arguments: list[str]) -> None:
    os.chdir(folder)
    # Other plugins of the environment take a second to import.
    os.environ.update(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", WANTED=wanted)
    with Path("stdout").open("wb") as out, Path("stderr").open("wb") as err:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(err.fileno(), sys.stderr.fileno())
        sys.exit(pytest.main(arguments))


def test_each_check_is_a_test_and_the_bundle_is_verified_once(tmp_path: Path) -> None:
    """Beside the user's own tests; a skipped check is a skip, and the figures are in the JUnit
    file.
    """
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    done = _pytest(
        tmp_path,
        "rest=pass,speed=skipped,memory=measured",
        "--racdeploy-bundle",
        "bundle",
        f"--junit-xml={tmp_path / 'junit.xml'}",
    )
    assert done.returncode == 0, done.stdout
    assert "PASSED test_own.py::test_own" in done.stdout
    assert "PASSED bundle::accuracy" in done.stdout
    assert "PASSED bundle::verdict" in done.stdout
    assert "skipped: what speed found" in done.stdout
    assert "measured: what memory found" in done.stdout
    assert (tmp_path / "verified").read_text() == "x"
    properties = {
        p.get("name"): p.get("value")
        for p in ElementTree.parse(tmp_path / "junit.xml").iter("property")
    }
    assert properties["accuracy.number"] == "0.25"


def test_a_plain_file_is_compared_with_a_reference(tmp_path: Path) -> None:
    """Its checks are tests as those of a bundle are; they are named after the file."""
    options = ("--racdeploy-candidate", "org/m:q4_k_m", "--racdeploy-reference", "ref")
    done = _pytest(tmp_path, "rest=pass,tokens=fail", *options, "--racdeploy-tier", "smoke")
    assert done.returncode == 1, done.stdout
    assert "FAILED m:q4_k_m::tokens" in done.stdout
    assert "PASSED m:q4_k_m::accuracy" in done.stdout
    assert (tmp_path / "compared").read_text() == "['org/m:q4_k_m'] ref smoke"


def test_a_failed_check_says_what_it_found_without_a_traceback(tmp_path: Path) -> None:
    """And the verdict fails with it."""
    done = _pytest(tmp_path, "rest=pass,thinking=fail", "--racdeploy-bundle", "bundle")
    assert done.returncode == 1
    assert "thinking: fail: what thinking found\n  → do this" in done.stdout
    assert "FAILED bundle::thinking" in done.stdout
    assert "FAILED bundle::verdict" in done.stdout
    assert "Traceback" not in done.stdout
    assert "runtest" not in done.stdout


@pytest.mark.parametrize(("gate", "code"), [("fail", 1), ("pass", 0)])
def test_the_gate_says_what_too_little_data_means(tmp_path: Path, gate: str, code: int) -> None:
    """It fails, unless the gate lets it pass; then it is a skip that says so."""
    (tmp_path / "gate.toml").write_text(f'inconclusive = "{gate}"\n')
    arguments = "--racdeploy-bundle", "bundle", "--racdeploy-gate", "gate.toml"
    done = _pytest(tmp_path, "rest=pass,accuracy=inconclusive", *arguments)
    assert done.returncode == code, done.stdout
    assert (
        "FAILED bundle::accuracy" if code else "inconclusive: what accuracy found"
    ) in done.stdout


def test_a_tier_goes_to_the_gate(tmp_path: Path) -> None:
    """Its own rule for too little data counts."""
    (tmp_path / "gate.toml").write_text('[tiers.smoke]\ninconclusive = "pass"\n')
    arguments = ["--racdeploy-bundle", "bundle", "--racdeploy-gate", "gate.toml"]

    for tier, code in (((), 1), (("--racdeploy-tier", "smoke"), 0)):
        done = _pytest(tmp_path, "rest=pass,accuracy=inconclusive", *arguments, *tier)
        assert done.returncode == code, done.stdout


def test_only_skips_are_no_success(tmp_path: Path) -> None:
    """Missing data never passes: the verdict is a test of its own."""
    done = _pytest(tmp_path, "rest=skipped", "--racdeploy-bundle", "bundle")
    assert done.returncode == 1
    assert "verdict: inconclusive: Every check was skipped" in done.stdout


def test_an_error_fails_every_check_with_its_remedy(tmp_path: Path) -> None:
    """A bundle that cannot be verified has passed nothing, and is tried once for all checks."""
    done = _pytest(tmp_path, "error=1,rest=pass", "--racdeploy-bundle", "bundle")
    assert done.returncode == 1
    assert "the bundle is damaged\n  → copy it again" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
    assert (tmp_path / "verified").read_text() == "x"


@pytest.mark.parametrize(
    ("gate", "arguments", "message"),
    [
        ("margn = 0.1", "--racdeploy-bundle bundle --racdeploy-gate gate.toml", "margn"),
        ("", "--racdeploy-bundle bundle --racdeploy-tier smok", "smok"),
        ("", "--racdeploy-gate gate.toml", "--racdeploy-gate without --racdeploy-bundle"),
        ("", "--racdeploy-tier smoke", "--racdeploy-tier without --racdeploy-bundle"),
        ("", "--racdeploy-candidate a.gguf", "-candidate without --racdeploy-reference"),
        ("", "--racdeploy-reference a.gguf", "-reference without --racdeploy-candidate"),
        ("", "--racdeploy-candidate a --racdeploy-reference b --racdeploy-tier smok", "smok"),
    ],
)
def test_a_wrong_gate_or_tier_is_wrong_usage(
    tmp_path: Path, gate: str, arguments: str, message: str
) -> None:
    """Pytest's exit code 4, before anything runs."""
    (tmp_path / "gate.toml").write_text(gate)
    done = _pytest(tmp_path, "rest=pass", *arguments.split())
    assert done.returncode == 4
    assert message in done.stderr


def test_without_the_option_nothing_is_loaded(tmp_path: Path) -> None:
    """Every pytest run of the environment loads the file: it brings neither numpy nor checks."""
    heavy = ("numpy", "pydantic", "jinja2")
    code = f"import sys, {PLUGIN}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_an_installed_racdeploy_brings_the_plugin(tmp_path: Path) -> None:
    """By its entry point, whose name is the module's, so that ``-p`` does not load it twice."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"]["pytest11"]
    assert entries == {PLUGIN: PLUGIN}
    info = tmp_path / "site" / "racdeploy_like-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: racdeploy-like\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[pytest11]\n{PLUGIN} = {PLUGIN}\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    for more in ([], ["-p", PLUGIN]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--help", "-c", os.devnull, *more],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert "--racdeploy-bundle" in done.stdout, done.stderr

"""pytest plugin: ``pytest --racdeploy-bundle BUNDLE`` runs each check of a bundle as a test.

``--racdeploy-candidate MODEL --racdeploy-reference REFERENCE`` does so for a model of any origin.
Nothing of racdeploy is imported unless the option is given, since pytest loads every plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from racdeploy.results.checks import CheckResult
    from racdeploy.results.report import Report
    from racdeploy.verification.gate import Gate

_VERDICT = "verdict"
_OPTIONS: dict[str, dict[str, Any]] = {
    "bundle": {"type": Path, "metavar": "FOLDER", "help": "bundle to verify"},
    "candidate": {"metavar": "MODEL", "help": "model to compare"},
    "reference": {
        "metavar": "MODEL",
        "help": "model to compare it with, or the folder that racdeploy record wrote",
    },
    "gate": {"type": Path, "metavar": "FILE", "help": "TOML file with limits"},
    "tier": {
        "default": "",
        "metavar": "NAME",
        "help": "how much is verified: smoke, standard or release",
    },
    "threads": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "CPU threads; 0 uses every core",
    },
}
"""Command-line options of pytest, without their prefix."""
_NEEDS = {
    "gate": ("bundle", "candidate"),
    "tier": ("bundle", "candidate"),
    "reference": ("candidate",),
    "candidate": ("reference",),
}
"""Options of which one must be given with an option."""


class CheckFailure(Exception):
    """A check did not pass; pytest shows the message without a traceback."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options."""
    group = parser.getgroup("racdeploy", "verification by racdeploy")
    for name, settings in _OPTIONS.items():
        group.addoption(f"--racdeploy-{name}", **settings)


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Append the model's tests to the collected ones."""
    values = {name: config.getoption(f"--racdeploy-{name}") for name in _OPTIONS}
    for name, owners in _NEEDS.items():
        if values[name] and not any(map(values.get, owners)):
            raise pytest.UsageError(f"--racdeploy-{name} without --racdeploy-{owners[0]}")
    if values["threads"] < 0:
        raise pytest.UsageError(f"--racdeploy-threads is {values['threads']}, must be at least 0")
    model = values["bundle"] or values["candidate"]
    if not model:
        return

    from racdeploy.errors import UsageError

    try:
        run, gate = _open(**values)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error

    name = Path(model).resolve().name
    tests = ModelTests.from_parent(session, name=f"model {name}", nodeid=name)
    tests.prepare(Path(model), run, gate.inconclusive == "pass")
    items.extend(tests.collect())


def _open(
    bundle: Path | None, candidate: str, reference: str, gate: Path | None, tier: str, threads: int
) -> tuple[Callable[[], Report], Gate]:
    """Return what makes the report, and its limits."""
    if bundle is None:
        from racdeploy import compare
        from racdeploy.verification.gate import read_gate

        def ask() -> Report:
            (verdict,) = compare(
                [candidate], against=reference, tier=tier, gate=gate, threads=threads
            )
            return verdict.report

        return ask, read_gate(gate).for_tier(tier)

    from racdeploy.bundles.bundle import BundleToVerify
    from racdeploy.bundles.verify import BundleVerification
    from racdeploy.files.caches import default_work_folder

    work = default_work_folder()
    again = BundleVerification(BundleToVerify(bundle, gate, tier, work=work, threads=threads))
    return lambda: again.run()[0], again.gate


class ModelTests(pytest.Collector):
    """Collector of a model's tests; the first test that runs asks the model for all."""

    def prepare(self, path: Path, run: Callable[[], Report], accepts_inconclusive: bool) -> None:
        self.model_path = path
        self.accepts_inconclusive = accepts_inconclusive
        self._run = run
        self._result: Report | Exception | None = None

    def collect(self) -> list[pytest.Item]:
        from racdeploy import plugins

        names = [*plugins.list_names("checks"), _VERDICT]
        return [Check.from_parent(self, name=name) for name in names]

    def report(self) -> Report:
        """Return the report, made once; an error is raised again for every test."""
        from racdeploy.errors import RacdeployError

        if self._result is None:
            try:
                self._result = self._run()
            except RacdeployError as error:
                self._result = error

        if isinstance(self._result, Exception):
            raise self._result

        return self._result


class Check(pytest.Item):
    """One check of a model, or the verdict over all of them."""

    parent: ModelTests

    def runtest(self) -> None:
        check = self._result(self.parent.report())
        for name, value in check.figures.items():
            self.user_properties.append((f"{check.name}.{name}", value))

        accepted = check.verdict == "inconclusive" and self.parent.accepts_inconclusive
        if check.verdict in ("measured", "skipped") or accepted:
            pytest.skip(f"{check.verdict}: {check.summary}")

        if check.verdict != "pass":
            message = f"{check.name}: {check.verdict}: {check.summary}"
            remedy = check.remedy or "see the report"
            raise CheckFailure(f"{message}\n  → {remedy}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show the message of a failed check or racdeploy error; other errors get a traceback."""
        from racdeploy.errors import RacdeployError

        if isinstance(excinfo.value, CheckFailure | RacdeployError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.parent.model_path, None, self.nodeid

    def _result(self, report: Report) -> CheckResult:
        from racdeploy.report.summary import write_findings
        from racdeploy.results.checks import CheckResult

        if self.name == _VERDICT:
            return CheckResult(
                name=_VERDICT, verdict=report.verdict, summary=write_findings(report)
            )
        return next(check for check in report.checks if check.name == self.name)

"""pytest plugin: ``pytest --racdeploy-bundle BUNDLE`` runs each check of a bundle as a test.

Nothing of racdeploy is imported unless the option is given, since pytest loads every plugin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from racdeploy.bundles.verify import BundleVerification
    from racdeploy.results.checks import CheckResult
    from racdeploy.results.report import Report

_VERDICT = "verdict"


class CheckFailure(Exception):
    """A check did not pass; pytest shows the message without a traceback."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options."""
    group = parser.getgroup("racdeploy", "verification of a racdeploy bundle")
    group.addoption("--racdeploy-bundle", type=Path, metavar="FOLDER", help="bundle to verify")
    group.addoption("--racdeploy-gate", type=Path, metavar="FILE", help="TOML file with limits")
    tier = "how much is verified: smoke, standard or release"
    group.addoption("--racdeploy-tier", default="", metavar="NAME", help=tier)
    threads = "CPU threads; 0 uses every core"
    group.addoption("--racdeploy-threads", type=int, default=0, metavar="N", help=threads)


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Append the bundle's tests to the collected ones."""
    folder: Path | None = config.getoption("--racdeploy-bundle")
    gate_file: Path | None = config.getoption("--racdeploy-gate")
    tier: str = config.getoption("--racdeploy-tier")
    if folder is None:
        for option, value in (("gate", gate_file), ("tier", tier)):
            if value:
                raise pytest.UsageError(f"--racdeploy-{option} without --racdeploy-bundle")
        return

    from racdeploy.bundles.bundle import BundleToVerify
    from racdeploy.bundles.verify import BundleVerification
    from racdeploy.errors import UsageError
    from racdeploy.files.caches import default_work_folder

    threads = config.getoption("--racdeploy-threads")
    if threads < 0:
        raise pytest.UsageError(f"--racdeploy-threads is {threads}, must be at least 0")

    work = default_work_folder()
    try:
        again = BundleVerification(
            BundleToVerify(folder, gate_file, tier, work=work, threads=threads)
        )
        accepts_inconclusive = again.gate.inconclusive == "pass"
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error

    name = folder.resolve().name
    tests = BundleTests.from_parent(session, name=f"bundle {name}", nodeid=name)
    tests.prepare(folder, again, accepts_inconclusive)
    items.extend(tests.collect())


class BundleTests(pytest.Collector):
    """Collector of a bundle's tests; the first test that runs verifies the bundle for all."""

    def prepare(self, folder: Path, again: BundleVerification, accepts_inconclusive: bool) -> None:
        self.folder = folder
        self.accepts_inconclusive = accepts_inconclusive
        self._again = again
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
                self._result, _ = self._again.run()
            except RacdeployError as error:
                self._result = error

        if isinstance(self._result, Exception):
            raise self._result

        return self._result


class Check(pytest.Item):
    """One check of a bundle, or the verdict over all of them."""

    parent: BundleTests

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
        folder = self.parent.folder
        return folder, None, self.nodeid

    def _result(self, report: Report) -> CheckResult:
        from racdeploy.report.summary import write_findings
        from racdeploy.results.checks import CheckResult

        if self.name == _VERDICT:
            return CheckResult(
                name=_VERDICT, verdict=report.verdict, summary=write_findings(report)
            )
        return next(check for check in report.checks if check.name == self.name)

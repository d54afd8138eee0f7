"""``pytest --racdeploy-bundle BUNDLE``: each check as a test; imports nothing unless asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from racdeploy.bundles.verify import Reverification
    from racdeploy.results.checks import CheckResult
    from racdeploy.results.report import Report

_VERDICT = "verdict"


class CheckFailure(Exception):
    """A check did not pass; the message is all there is to show."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
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
    """Add the tests of the bundle behind those that were collected."""
    folder: Path | None = config.getoption("--racdeploy-bundle")
    gate_file: Path | None = config.getoption("--racdeploy-gate")
    tier: str = config.getoption("--racdeploy-tier")
    if folder is None:
        for option, given in (("gate", gate_file), ("tier", tier)):
            if given:
                raise pytest.UsageError(f"--racdeploy-{option} without --racdeploy-bundle")
        return

    from racdeploy.bundles.bundle import Bundle
    from racdeploy.bundles.verify import ArtifactAnswerer, Reverification
    from racdeploy.errors import UsageError
    from racdeploy.files.caches import default_work

    threads = config.getoption("--racdeploy-threads")
    if threads < 0:
        raise pytest.UsageError(f"--racdeploy-threads is {threads}, must be at least 0")

    local = ArtifactAnswerer(Bundle(folder, gate_file, tier), default_work(), threads)

    try:
        again = Reverification(local)
        accepts_inconclusive = again.gate.inconclusive == "pass"
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error

    name = folder.resolve().name
    tests = BundleTests.from_parent(session, name=f"bundle {name}", nodeid=name)
    tests.prepare(folder, again, accepts_inconclusive)
    items.extend(tests.collect())


class BundleTests(pytest.Collector):
    """A bundle: verified when its first test runs, once."""

    def prepare(self, folder: Path, again: Reverification, accepts_inconclusive: bool) -> None:
        self.folder = folder
        self.accepts_inconclusive = accepts_inconclusive
        self._again = again
        self._found: Report | Exception | None = None

    def collect(self) -> list[pytest.Item]:
        from racdeploy import plugins

        names = [*plugins.names("checks"), _VERDICT]
        return [Check.from_parent(self, name=name) for name in names]

    def report(self) -> Report:
        """Return the report; an error is the same for every test."""
        from racdeploy.errors import RacdeployError

        if self._found is None:
            try:
                self._found, _ = self._again.run()
            except RacdeployError as error:
                self._found = error

        if isinstance(self._found, Exception):
            raise self._found

        return self._found


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
            found = f"{check.name}: {check.verdict}: {check.summary}"
            remedy = check.remedy or "see the report"
            raise CheckFailure(f"{found}\n  → {remedy}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show what a check or racdeploy says; a traceback is for everything else."""
        from racdeploy.errors import RacdeployError

        if isinstance(excinfo.value, CheckFailure | RacdeployError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        folder = self.parent.folder
        return folder, None, self.nodeid

    def _result(self, report: Report) -> CheckResult:
        from racdeploy.report.summary import explanation
        from racdeploy.results.checks import CheckResult

        if self.name == _VERDICT:
            return CheckResult(name=_VERDICT, verdict=report.verdict, summary=explanation(report))
        return next(check for check in report.checks if check.name == self.name)

"""Checks: one file each, ``check(evidence) -> CheckResult``."""

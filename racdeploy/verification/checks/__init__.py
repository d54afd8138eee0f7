"""Checks of an exported model: one file each, with ``check(evidence) -> Outcome``."""

"""The command line: one command per verb, no logic."""

from racdeploy.cli.app import main

__all__ = ["main"]

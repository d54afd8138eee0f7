"""Processes that have torch from their start: a server imports it once, and forks each of them."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "pytest",
    "racdeploy.pipeline.build",
    "tests.support.commands",
    "tests.support.tiny_training_run",
    "transformers.models.qwen3.modeling_qwen3",
]


def fork_context() -> ForkServerContext:
    """Return the context of the one server that all tests of this process share."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context

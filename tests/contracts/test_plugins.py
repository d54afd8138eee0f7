"""Plugins are files: finding them, and the errors of not finding them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from racdeploy import plugins
from tests.support.errors import raises


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_plugin_imports(kind: str) -> None:
    """No file of a plugin folder is broken, and there is at least one."""
    assert plugins.list_names(kind)
    for name in plugins.list_names(kind):
        plugins.load(kind, name)


def test_an_unknown_name_names_the_nearest() -> None:
    """A typing error is answered with the likely name and all known ones."""
    with raises("unknown-plugin", "method 'sparsgpt'", "'sparsegpt'", "magnitude"):
        plugins.load("prune_methods", "sparsgpt")


def test_a_broken_file_is_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that exists and does not import says so, or which extra it lacks."""
    package = tmp_path / "broken_tasks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "half.py").write_text("import a_package_that_is_not_there\n")
    (package / "lacking.py").write_text("import llama_cpp\n")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(plugins.KINDS, "tasks", "broken_tasks")
    plugins.list_names.cache_clear()
    try:
        with raises("broken-plugin", "a_package_that_is_not_there"):
            plugins.load("tasks", "half")
        with raises("missing-extra", "llama-cpp-python"):
            plugins.load("tasks", "lacking")
    finally:
        plugins.list_names.cache_clear()

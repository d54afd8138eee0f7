"""CI runs those files of ``make test-more`` that a change reaches by imports."""

from __future__ import annotations

import pytest

from tests.support import reached


@pytest.mark.parametrize(
    ("changed", "test_file"),
    [
        ("tests/pruning/test_kills.py", "tests/pruning/test_kills.py"),
        ("tests/support/tiny_models.py", "tests/pruning/test_kills.py"),
        ("racdeploy/pruning/walk/survey.py", "tests/pruning/test_kills.py"),
        ("racdeploy/pruning/methods/wanda.py", "tests/pruning/test_kills.py"),
        ("racdeploy/tuning/race.py", "tests/end_to_end/test_tune.py"),
        ("targets/gguf.toml", "tests/end_to_end/test_tune.py"),
    ],
)
def test_a_change_reaches_what_imports_it(changed: str, test_file: str) -> None:
    """Itself, its helpers, modules that are imported late, plugins by name, and data."""
    assert changed in reached.list_reached(test_file)


def test_only_what_is_reached_is_selected() -> None:
    """Not the walk, by a change of the server; everything, by one of the versions."""
    everything = reached.select_files({"pyproject.toml"})
    assert reached.select_files({"docs/ci.md"}) == []
    assert "tests/pruning/test_device.py" not in reached.select_files({"racdeploy/serve/app.py"})
    assert {"tests/pruning/test_device.py", "tests/end_to_end/test_tune.py"} <= set(everything)

"""The notebook runs from its first cell to its last, with fewer prompts than a reader asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/before_after.ipynb"


def test_the_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave a bundle that is smaller, a picture of both models, and an answer."""
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            source = source.replace('"traces.count": 128', '"traces.count": 16')
            source = source.replace('"verify.count": 200', '"verify.count": 24')
            exec(compile(source, NOTEBOOK.name, "exec"), names)

    bundle, figure = names["bundle"], names["figure"]
    assert bundle.size_bytes < bundle.reference_size_bytes
    assert len(names["before"]) == len(names["after"]) == 24
    assert [len(axes.collections) + len(axes.patches) for axes in figure.axes] == [2, 1]
    assert names["result"].answer

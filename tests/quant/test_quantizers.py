"""The comparison of quantizers reads files rightly, and does not repeat what it has finished."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from benchmarks import quantizers
from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from tests.support.tiny_models import make_checkpoint

TEXT = "A sequence is measured on what it says, and a text of another kind on the rest of it. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose query and key rows have another order in GGUF."""
    return make_checkpoint(tmp_path_factory.mktemp("quantizers") / "model", "llama")


def test_linears_are_read_in_the_order_of_the_checkpoint(model: Path, tmp_path: Path) -> None:
    """Those of a file in F32 are the checkpoint's own."""
    checkpoint = Checkpoint(model)
    file = gguf.export(checkpoint, tmp_path / "f32.gguf", quant="f32").path
    linears = dict(quantizers.read_linears(file, checkpoint))
    assert {*checkpoint.shape.prunable_weights} == {*linears}
    for name, weight_OI in linears.items():
        np.testing.assert_array_equal(checkpoint.read(name), weight_OI)


def test_divergence_counts_the_predictions_of_the_completion() -> None:
    """Of five tokens, the prompt is two: their last one and two of the others predict."""
    p_TV, q_TV = np.random.default_rng(0).standard_normal((2, 5, 7))
    measured = quantizers.measure_kl(
        lambda ids: torch.from_numpy(p_TV), lambda ids: torch.from_numpy(q_TV), [([0] * 5, 2)]
    )
    exact_TV = rel_entr(softmax(p_TV, 1), softmax(q_TV, 1))
    assert measured["tokens"] == [3]
    assert measured["kl"] == pytest.approx(exact_TV[1:4].sum() / 3, rel=1e-12)


def test_a_finished_cell_is_not_repeated(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two quantizers of one format: a second call prints the same table at once."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 100)
    words = f"--model {model} --tasks gcd --quants q4_0 --arms nearest ours --seeds 0 --traces 4"
    words += f" --held-out 2 --max-new-tokens 8 --text {text} --work {tmp_path} --out {tmp_path}/o"
    monkeypatch.setattr(sys, "argv", ["quantizers", *words.split()])
    monkeypatch.setattr(quantizers.subprocess, "run", _run_here)
    quantizers.main()
    table = capsys.readouterr().out
    nearest, ours = table.splitlines()[2:4]
    assert nearest.startswith("| q4_0 | 0 | nearest |")
    assert ours.startswith("| q4_0 | 0 | ours |")

    monkeypatch.delattr(quantizers.Benchmark, "_quantize")
    quantizers.main()
    assert table == capsys.readouterr().out


def _run_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module to its end in this process, which has torch already."""
    python, flag, module, *arguments = command
    assert [python, flag] == [sys.executable, "-m"]
    out = io.StringIO()
    with (
        mock.patch.dict(sys.modules),
        mock.patch.object(sys, "argv", [module, *arguments]),
        contextlib.redirect_stdout(out),
    ):
        sys.modules.pop(module, None)  # its code is run once more, as the main module
        runpy.run_module(module, run_name="__main__")
    return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

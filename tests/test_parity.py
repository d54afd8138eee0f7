"""The gates between the export and the evaluation: a right file passes, each kind of wrong one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy import parity
from racdeploy.checkpoint import Checkpoint
from racdeploy.errors import GateError
from racdeploy.export import ExportResult, _gguf_tensors, write
from racdeploy.parity import Held, hold
from racdeploy.recipe import Export
from racdeploy.runtime.template import PromptEncoder
from tests.tiny_models import make_checkpoint

IDS = [int(i * 37 % 480) for i in range(40)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path / "model", "llama"))


def _export(checkpoint: Checkpoint, out: Path, settings: Export) -> ExportResult:
    return write(checkpoint, out, settings)


def _hold(checkpoint: Checkpoint, artifact: ExportResult, settings: Export) -> Held:
    encoder = PromptEncoder.from_folder(checkpoint.folder)
    return hold(checkpoint, artifact, settings, "llamacpp", encoder, IDS, threads=1)


def test_a_right_file_passes_and_leaves_its_figures(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The notes hold the F32 error and the artifact's own divergence; the probes go on to the report."""
    settings = Export(quant="q8_0")
    held = _hold(checkpoint, _export(checkpoint, tmp_path / "m.gguf", settings), settings)
    assert held.probes is not None
    assert len(held.probes) > 300
    assert held.notes[0].startswith("an F32 file differs from torch by")
    assert held.notes[1].startswith(f"before the evaluation, llamacpp: {len(held.probes)} strings tokenize alike, KL ")


def test_the_first_string_that_differs_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A wrong pre-tokenizer stops the build before any logits are computed."""
    settings = Export(quant="q8_0", pre_tokenizer="gpt-2")
    artifact = _export(checkpoint, tmp_path / "m.gguf", settings)
    with pytest.raises(GateError, match=r"tokenizes '.+' otherwise than the checkpoint") as caught:
        _hold(checkpoint, artifact, settings)
    assert caught.value.exit_code == 1


def test_a_wrong_tensor_is_found_in_the_f32_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are not reordered change the logits from the second position on: the first has no rotation."""
    settings = Export(quant="q8_0")
    artifact = _export(checkpoint, tmp_path / "m.gguf", settings)
    order = _gguf_tensors.rotary_order
    monkeypatch.setattr(_gguf_tensors, "rotary_order", lambda rows, heads: sorted(order(rows, heads)))
    with pytest.raises(GateError, match="first at position 1: logits differ by"):
        _hold(checkpoint, artifact, settings)


def test_an_artifact_of_other_weights_is_found(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its tokens are right and so is the F32 file; its own logits are not."""
    settings = Export(quant="q8_0")
    other = Checkpoint(make_checkpoint(tmp_path / "other", "llama", seed=1))
    with pytest.raises(GateError, match=r"mean KL .* worst at position \d+"):
        _hold(checkpoint, _export(other, tmp_path / "m.gguf", settings), settings)


def test_a_large_model_says_why_there_was_no_f32_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is in the report's notes."""
    monkeypatch.setattr(parity, "F32_LIMIT_BYTES", 1000)
    settings = Export(quant="q8_0")
    held = _hold(checkpoint, _export(checkpoint, tmp_path / "m.gguf", settings), settings)
    assert "no F32 file was compared with torch: it would take 0.0 GB" in held.notes[0]

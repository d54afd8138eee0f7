"""The gates between export and evaluation: a right file passes, each kind of wrong one is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from racdeploy.engines.engine import Engine, EngineSettings
from racdeploy.exporting import ExportResult, write
from racdeploy.models import conversion
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import f32_file, gates
from racdeploy.pipeline.gates import GateResult, check_artifact
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Export, Recipe
from tests.support.errors import raises
from tests.support.tiny_models import edit_json, make_checkpoint

IDS = [int(i * 37 % 480) for i in range(40)]
MANY_IDS = [int(i * 37 % 480) for i in range(128)]
"""As many positions as a build compares: between torch's portable, AVX2 and AVX-512 kernels their
median differs by a fiftieth, that of 40 by a third."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path / "model", "llama"))


def _export(checkpoint: Checkpoint, out: Path, settings: Export) -> ExportResult:
    return write(checkpoint, out, settings)


def _check(
    checkpoint: Checkpoint, artifact: ExportResult, settings: Export, ids: Sequence[int] = IDS
) -> GateResult:
    job = Job(Recipe(model=str(checkpoint.folder), export=settings))
    return check_artifact(job, checkpoint, artifact, ids, threads=1)


def test_a_right_file_passes_and_leaves_its_figures(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The notes hold the F32 error and the artifact's divergence; the report gets the probes."""
    settings = Export(quant="q8_0")
    held = _check(checkpoint, _export(checkpoint, tmp_path / "m.gguf", settings), settings)
    assert held.probes is not None
    assert len(held.probes) > 300
    assert held.notes[0].startswith("an F32 file differs from torch by")
    assert held.notes[1].startswith(
        f"before the evaluation, llamacpp: {len(held.probes)} strings tokenize alike, KL "
    )


def test_the_first_string_that_differs_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A wrong pre-tokenizer stops the build before any logits are computed."""
    settings = Export(quant="q8_0", pre_tokenizer="gpt-2")
    artifact = _export(checkpoint, tmp_path / "m.gguf", settings)
    with raises("tokens-differ", "of 380"):
        _check(checkpoint, artifact, settings)


def test_a_wrong_tensor_is_found_in_the_f32_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in a wrong order change logits from the second position: the first is not rotated."""
    settings = Export(quant="q8_0")
    artifact = _export(checkpoint, tmp_path / "m.gguf", settings)
    order = conversion.find_rotary_order
    monkeypatch.setattr(
        conversion, "find_rotary_order", lambda rows, heads: np.sort(order(rows, heads))
    )
    with raises("f32-file-differs", "position 1:"):
        _check(checkpoint, artifact, settings)


def test_an_artifact_of_other_weights_is_found(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its tokens are right and so is the F32 file; its own logits are not."""
    settings = Export(quant="q8_0")
    other = Checkpoint(make_checkpoint(tmp_path / "other", "llama", seed=1))
    with raises("logits-differ", "position"):
        _check(checkpoint, _export(other, tmp_path / "m.gguf", settings), settings)


def test_a_wrong_fast_path_of_the_processor_is_told_from_a_wrong_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only repacked weights fail, the message names llama.cpp's setting; else it does not."""
    settings = Export(quant="q8_0")
    other = Checkpoint(make_checkpoint(tmp_path / "other", "llama", seed=1))
    right, wrong = (
        _export(c, tmp_path / f"{c.folder.name}.gguf", settings) for c in (checkpoint, other)
    )
    opened = gates.open_engine

    def open_fast(backend: str, path: Path, engine: EngineSettings) -> Engine:
        is_artifact = path == right.path
        return opened(
            backend, wrong.path if is_artifact and engine.repack_weights else path, engine
        )

    monkeypatch.setattr(gates, "open_engine", open_fast)
    with raises("wrong-fast-path", "use_extra_bufts = False"):
        _check(checkpoint, right, settings)
    with raises("logits-differ"):
        _check(checkpoint, wrong, settings)


def test_first_choices_are_held_where_kl_does_not_see_them(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Of 480 tokens one e times as likely as the others is cheap to swap: 0.0035 nats."""
    artifact = _export(checkpoint, tmp_path / "m.gguf", Export(quant="q8_0"))
    expected_TV, swapped_TV, tied_TV = (np.zeros((40, 480), np.float32) for _ in range(3))
    expected_TV[:, 3], swapped_TV[:, 4] = 1.0, 1.0
    tied_TV[:, 3], tied_TV[:, 4] = 1.0, 1.001
    assert "clearly other tokens: 0.0%" in gates.check_logits(
        checkpoint, artifact, expected_TV, expected_TV
    )
    with raises("first-choices-differ", "100.0%", "limit 10.0%", "position 0"):
        gates.check_logits(checkpoint, artifact, expected_TV, swapped_TV)
    expected_TV[:, 4] = 0.5  # not half as likely would be 1 - log 2
    assert "top-1 0.0%" in gates.check_logits(checkpoint, artifact, expected_TV, tied_TV)


def _make_gemma(folder: Path) -> Checkpoint:
    """Return a Gemma of eight blocks with hidden states of the size of a published one's, 200."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    make_checkpoint(folder, "gemma3_text", **sizes)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "gate_proj" in name:
            tensors[name] = weight * 4
        elif "post_feedforward_layernorm" in name:
            tensors[name] = weight + 20
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def _write_other(patch: pytest.MonkeyPatch, other: Checkpoint) -> None:
    """Let the F32 file hold another model."""
    patch.setattr(f32_file.exporting, "write", lambda _, out, settings: write(other, out, settings))


def test_a_table_of_gelu_is_told_from_another_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right file passes, though lookups change its logits by more than sums do.

    Not so where the table has erf in place of tanh, or where a rotary base is another.
    """
    checkpoint = _make_gemma(tmp_path / "model")
    settings = Export(quant="f16")
    artifact = _export(checkpoint, tmp_path / "m.gguf", settings)

    note = _check(checkpoint, artifact, settings, MANY_IDS).notes[0]
    assert "gelu_pytorch_tanh, looked up in half precision" in note
    assert "(limit 0.000976562)" in note

    other = _make_gemma(tmp_path / "other")
    config = other.folder / "config.json"
    ropes = json.loads(config.read_text(encoding="utf-8"))["rope_parameters"]
    ropes["sliding_attention"]["rope_theta"] = 500.0
    edit_json(config, rope_parameters=ropes)
    with monkeypatch.context() as patch:
        _write_other(patch, Checkpoint(other.folder))
        with raises("f32-file-differs", "gelu_pytorch_tanh", "llamacpp on"):
            _check(checkpoint, artifact, settings, MANY_IDS)

    # transformers has bound its own gelu, so the exact reference still has tanh: it is too far too.
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate="none": gelu(x))
    with raises("f32-file-differs"):
        _check(checkpoint, artifact, settings, MANY_IDS)


@pytest.mark.parametrize(("family", "weights"), [("qwen3", "gate_proj"), ("nemotron_h", "up_proj")])
def test_other_activations_are_exact_for_large_inputs(
    tmp_path: Path, family: str, weights: str
) -> None:
    """SiLU and squared ReLU have no table in ggml: the limit of sums holds for inputs of 100."""
    folder = make_checkpoint(tmp_path / "model", family)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if weights in name:
            tensors[name] = weight * 40
    save_file(tensors, folder / "model.safetensors")
    checkpoint, settings = Checkpoint(folder), Export(quant="f16")

    note = _check(checkpoint, _export(checkpoint, tmp_path / "m.gguf", settings), settings).notes[0]
    assert note.startswith("an F32 file differs from torch by")
    assert "(limit 0.0001)" in note.replace(",", ")")


def test_an_engine_without_a_table_passes_by_the_exact_reference() -> None:
    """The nearest reference decides; the limit of lookups is for lookups alone."""
    generator = np.random.default_rng(0)
    exact_TV = generator.normal(size=(40, 480)).astype(np.float32)
    table_TV = exact_TV + 5e-4
    references = [
        f32_file.TorchReference("exact", exact_TV),
        f32_file.TorchReference("table", table_TV, limit=f32_file.MAX_LOOKUP_ERROR),
    ]
    assert "exact)" in f32_file.judge(exact_TV, references, "llamacpp")
    assert "table)" in f32_file.judge(table_TV, references, "llamacpp")

    # Only the exact reference is near, and a whole file may not be off by a lookup's error.
    with raises("f32-file-differs", "exact", "limit 0.0001"):
        f32_file.judge(exact_TV - 2e-3, references, "llamacpp")


def test_lookups_explain_no_more_than_two_passes_of_torch_differ() -> None:
    """The median's limit is 1.5 of theirs, and never below that of sums."""
    exact_TV = np.ones((40, 480), np.float32)
    reference = f32_file.TorchReference("table", exact_TV, f32_file.MAX_LOOKUP_ERROR, 2e-4)
    assert "positions by 1.8e-04" in f32_file.judge(exact_TV + 1.8e-4, [reference], "llamacpp")
    with raises("f32-file-differs", "limit 0.0002"):
        f32_file.judge(exact_TV + 2.2e-4, [reference], "llamacpp")


def test_a_large_model_says_why_there_was_no_f32_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is in the report's notes."""
    monkeypatch.setattr(f32_file, "MAX_F32_BYTES", 1000)
    settings = Export(quant="q8_0")
    held = _check(checkpoint, _export(checkpoint, tmp_path / "m.gguf", settings), settings)
    assert "no F32 file was compared with torch: it would take 0.0 GB" in held.notes[0]

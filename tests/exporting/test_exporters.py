"""Exporters of ONNX graphs: which one can run here, and what each is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from racdeploy import extras
from racdeploy.errors import MissingExtraError
from racdeploy.exporting import onnx as onnx_format
from racdeploy.exporting.onnx import exporters as onnx_exporters
from racdeploy.exporting.onnx.exporter_choice import check_exporter, export_verified_graph
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Export
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give packages other versions; an empty one is not installed."""
    versions: dict[str, str] = {"transformers": "4.57.6", "onnxruntime-genai": "0.15.2"}
    monkeypatch.setattr(extras, "installed_version", lambda name: versions.get(name, "9.0"))

    for name in ("genai", "optimum"):
        exporter = onnx_exporters.load(name)
        monkeypatch.setattr(exporter, "installed_version", extras.installed_version)

    monkeypatch.setattr(
        "racdeploy.plugins.is_installed", lambda module: bool(versions.get(module, "1.0"))
    )
    return versions.update


@pytest.mark.parametrize(
    ("builder", "models", "fits"),
    [
        ("0.15.2", "4.57.6", True),
        ("0.15.2", "5.24.0", True),
        ("0.16.0", "4.57.6", False),
        ("0.18.0", "4.57.6", False),
        ("0.18.0", "5.0.0", True),
    ],
)
def test_the_builder_is_asked_where_it_goes_with_transformers(
    install: Any, builder: str, models: str, fits: bool
) -> None:
    """From 0.16 on it imports classes of transformers 5; both versions and a remedy are named."""
    install({"onnxruntime-genai": builder, "transformers": models})
    if fits:
        check_exporter("genai")
        return

    with raises("old-transformers", builder, models, 'pip install "onnxruntime-genai<0.16"'):
        check_exporter("genai")


def test_optimum_runs_beside_transformers_4(install: Any) -> None:
    """Where it is missing, one line says how to get it."""
    check_exporter("optimum")

    install({"accelerate": ""})
    with pytest.raises(MissingExtraError) as missing:
        check_exporter("optimum")
    assert missing.value.remedy == 'pip install "racdeploy[optimum]"'

    install({"accelerate": "1.15", "transformers": "5.24.0"})
    with raises("new-transformers", "5.24.0", "racdeploy[all,optimum]"):
        check_exporter("optimum")


def test_auto_passes_over_what_cannot_run_here_and_says_how_to_get_it(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work it is enough that one of them can run."""
    install({"onnxruntime-genai": "0.18.0", "transformers": "4.57.6", "optimum": ""})
    torch = onnx_exporters.load("torch")
    monkeypatch.setattr(torch, "unsupported_reason", lambda checkpoint: "it is not asked")
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "llama"))

    check_exporter("auto")
    remedies = ('"onnxruntime-genai<0.16"', "racdeploy[optimum]")
    with raises("no-onnx-exporter", "genai: ", *remedies):
        export_verified_graph(checkpoint, "auto")

    install({"onnxscript": ""})
    with raises("old-transformers", "onnxruntime-genai 0.18.0"):
        check_exporter("auto")


def test_the_format_refuses_an_exporter_before_any_work(install: Any) -> None:
    """A build takes hours until it exports."""
    install({"onnxruntime-genai": "0.18.0"})
    with raises("old-transformers", "onnxruntime-genai 0.18.0"):
        onnx_format.check_options(Export(exporter="genai"))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {"rope_theta": 5000.0}),
        ("qwen3", {"rope_theta": 5000.0, "transformers5": True}),
        ("qwen2", {"rope_scaling": YARN}),
        ("gemma3_text", {}),
    ],
    ids=["theta", "transformers 5", "yarn", "one for each kind"],
)
def test_a_prepared_folder_has_the_rope_of_both_transformers(
    tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    """What this transformers reads from it is what the checkpoint says, whichever wrote that."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", family, **config))
    prepared = onnx_exporters.prepare(checkpoint, tmp_path / "prepared")
    written = json.loads((prepared / "config.json").read_text(encoding="utf-8"))
    assert {"rope_theta", "rope_scaling", "rope_parameters"} <= written.keys()
    assert Checkpoint(prepared).shape.rope == checkpoint.shape.rope

    read = AutoConfig.from_pretrained(prepared)
    if extras.installed_release("transformers") < (5,):
        found = {"rope_theta": read.rope_theta, **(read.rope_scaling or {"rope_type": "default"})}
        assert getattr(read, "rope_local_base_freq", None) == written.get("rope_local_base_freq")
    else:
        found = read.rope_parameters.get("full_attention", read.rope_parameters)
        local = read.rope_parameters.get("sliding_attention", {}).get("rope_theta")
        assert local == written.get("rope_local_base_freq")
    assert found.items() >= checkpoint.shape.rope.items()


def test_torch_refuses_what_cannot_be_traced_or_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are chosen by the data; states are asked of the cache since transformers 5.24."""
    torch = onnx_exporters.load("torch")
    routed = Checkpoint(make_checkpoint(tmp_path / "routed", "qwen3_moe"))
    assert "choice of experts" in torch.unsupported_reason(routed)

    plain = Checkpoint(make_checkpoint(tmp_path / "plain", "qwen3"))
    assert torch.unsupported_reason(plain) == ""
    other = Checkpoint(plain.folder)
    other.config["layer_types"] = ["full_attention", "conv"]
    assert "blocks of kind conv" in torch.unsupported_reason(other)

    with_state = Checkpoint(plain.folder)
    with_state.config["layer_types"] = ["full_attention", "linear_attention"]
    monkeypatch.setattr(torch, "installed_release", lambda _: (5, 23))
    assert "from transformers 5.24 on" in torch.unsupported_reason(with_state)
    monkeypatch.setattr(torch, "installed_release", lambda _: (5, 24))
    assert torch.unsupported_reason(with_state) == ""

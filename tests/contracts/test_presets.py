"""What every preset promises: llama.cpp's types where it has llama.cpp's name, and zeros where it
is called sparse.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant import presets
from racdeploy.recipe import Recipe
from tests.support.errors import raises
from tests.support.llama_quantize import quantize
from tests.support.tiny_models import make_checkpoint

NAMES = plugins.list_names("presets")
OF_EXPERTS = "mxfp4_moe"
SPARSE = tuple(name for name in NAMES if name.startswith("sparse_"))
MIXED = tuple(name for name in NAMES if name not in (*SPARSE, OF_EXPERTS))
ALIGNED = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def some_pairs(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    """Return every preset on one model and every model with one preset; the others are marked."""
    parameters: list[Any] = []
    for preset, model in pairs:
        is_kept = model == "deep" or preset == "q4_k_m"
        marks = [] if is_kept else [pytest.mark.more]
        parameters.append(pytest.param(preset, model, marks=marks))
    return parameters


def read_types(file: Path) -> dict[str, str]:
    """Return the type of every tensor of a GGUF file."""
    return {
        tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors
    }


def export_types(checkpoint: Checkpoint, out: Path, preset: str) -> dict[str, str]:
    """Export with a preset; return the types in the file, which the result states too."""
    result = export(checkpoint, out, quant=preset)
    assert {tensor.name: tensor.actual_quant for tensor in result.tensors} == read_types(out)
    return read_types(out)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Checkpoint, Path]]:
    """Return checkpoints and their F16 files: tied and untied, deep and shallow, one of narrow
    rows, one with q, k and v in a tensor, and one of experts.
    """
    root = tmp_path_factory.mktemp("presets")
    cases = {
        "deep": ALIGNED | {"num_hidden_layers": 17},
        "untied": ALIGNED | {"num_hidden_layers": 3, "tied": False},
        "narrow": {"num_hidden_layers": 9},
        "joined": ALIGNED | {"num_hidden_layers": 17, "family": "phi3"},
        "experts": ALIGNED | {"family": "gpt_oss", "head_dim": 64},
    }
    made = {}
    for name, case in cases.items():
        checkpoint = Checkpoint(make_checkpoint(root / name, **{"family": "llama"} | case))
        export(checkpoint, root / f"{name}.gguf", quant="f16")
        made[name] = checkpoint, root / f"{name}.gguf"
    return made


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        *some_pairs(itertools.product(MIXED, ("deep", "untied", "narrow", "joined"))),
        (OF_EXPERTS, "untied"),
        (OF_EXPERTS, "experts"),
    ],
)
def test_a_preset_of_llama_cpp_gives_its_types(
    models: Mapping[str, tuple[Checkpoint, Path]], tmp_path: Path, preset: str, model: str
) -> None:
    """Every tensor has the type that llama_model_quantize gives it.

    Where rows do not divide into blocks of 256, llama.cpp puts Q5_1 for Q5_K; that format is not
    here, Q8_0 is.
    """
    checkpoint, source = models[model]
    expected = read_types(quantize(source, tmp_path / "llama.gguf", preset.upper()))
    found = export_types(checkpoint, tmp_path / "ours.gguf", preset)
    assert found == {name: "q8_0" if kind == "q5_1" else kind for name, kind in expected.items()}
    is_plain = (preset, model) in {("q5_k_m", "narrow"), (OF_EXPERTS, "untied")}
    assert (len(set(found.values())) > 2) != is_plain


def test_another_rule_would_be_noticed(
    models: Mapping[str, tuple[Checkpoint, Path]], tmp_path: Path
) -> None:
    """The types of two presets differ on these models, so an equal answer is no accident."""
    checkpoint, source = models["deep"]
    expected = read_types(quantize(source, tmp_path / "llama.gguf", "Q4_K_M"))
    assert export_types(checkpoint, tmp_path / "ours.gguf", "q4_k_s") != expected


@pytest.mark.parametrize("model", ["deep", "untied", "narrow"])
@pytest.mark.parametrize("preset", SPARSE)
def test_a_sparse_preset_keeps_every_zero(
    models: Mapping[str, tuple[Checkpoint, Path]], tmp_path: Path, preset: str, model: str
) -> None:
    """Half of each linear is zero before and after, whatever the row length."""
    checkpoint, _ = models[model]
    tensors = load_file(checkpoint.folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor[:, ::2] = 0
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = export(Checkpoint(folder), tmp_path / "m.gguf", quant=preset)
    linears = [tensor for tensor in result.tensors if tensor.source.endswith("proj.weight")]
    assert all(quants.load(tensor.actual_quant).preserves_zero for tensor in linears)
    assert min(tensor.zeros for tensor in linears) >= 0.5
    dense = [
        tensor for tensor in result.tensors if tensor.name in ("token_embd.weight", "output.weight")
    ]
    assert all(quants.load(tensor.actual_quant).bits >= 8 for tensor in dense)


@pytest.mark.parametrize("preset", NAMES)
def test_a_preset_names_formats_that_exist(preset: str) -> None:
    """Base and rules are number formats of every file format that the preset is for."""
    plugin = presets.load(preset)
    for name in {plugin.quant, *(rule.quant for rule in plugin.rules)}:
        assert set(plugin.formats) <= set(quants.load(name).formats)


def test_more_bits_go_where_llama_cpp_puts_them() -> None:
    """The first and the last eighth, and every third between: worked out by hand for 16 blocks."""
    mix = presets.read("q4_k_m")
    raised = [
        i for i in range(16) if mix.choose(f"blk.{i}.ffn_down.weight", 16, False).quant == "q6_k"
    ]
    assert raised == [0, 1, 4, 7, 10, 13, 14, 15]


def test_names_are_read_as_people_write_them() -> None:
    """Hyphens and capitals are folded; an unknown name is answered with the nearest."""
    assert Recipe.combine(None, {"export": {"quant": "sparse-q4"}}).export.quant == "sparse_q4"
    assert Recipe.combine(None, {"export": {"quant": "Q4_K_M"}}).export.quant == "q4_k_m"
    with raises("unknown-plugin", "'sparse_q4'"):
        Recipe.combine(None, {"export": {"quant": "sparse-4"}})


@pytest.mark.parametrize(
    ("tensors", "values"),
    [
        ({"ffn_down(": "q6_k"}, ["'ffn_down('"]),
        ({"ffn_down": "q6k"}, ["'q6k'", "'q6_k'"]),
    ],
)
def test_bad_patterns_are_refused_at_once(tensors: dict[str, str], values: list[str]) -> None:
    """Before anything is read."""
    with raises("invalid-settings", *values):
        Recipe.combine(None, {"export": {"tensors": tensors}})


def test_the_first_pattern_wins() -> None:
    """The recipe's patterns come before the preset's, in the order of the recipe."""
    mix = presets.read("sparse_q4", {r"blk\.0\..*down": "f16", "down": "q8_0"})
    kinds = [mix.choose(f"blk.{i}.ffn_down.weight", 8, True).quant for i in range(2)]
    assert kinds == ["f16", "q8_0"]
    assert mix.choose("blk.1.ffn_up.weight", 8, True).quant == "q4_0"
    assert np.unique(
        [mix.choose(n, 8, True).quant for n in ("token_embd.weight", "output.weight")]
    ) == ["q8_0"]

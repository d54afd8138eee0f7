"""What is said of each family is what the code does with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.exporting.gguf.architecture import unsupported_reason
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.family_support import compare_folder, describe_families
from racdeploy.recipe import Structure
from tests.support.commands import racdeploy
from tests.support.tiny_models import (
    FAMILIES,
    GRANITE_EXPERTS,
    NEMOTRON_EXPERTS,
    edit_json,
    make_checkpoint,
)

ROWS = {(row.family, row.experts): row for row in describe_families()}
SHARES = {"experts": 0.5, "ffn": 2 / 3, "heads": 0.5, "kv_groups": 0.5, "blocks": 2 / 3}


def _can_cut(checkpoint: Checkpoint, part: str) -> bool:
    structure = Structure(keep={part: SHARES[part]}, uniform=True)
    try:
        plugins.load("structures", part).check(checkpoint, structure)
    except UsageError:
        return False
    return not unsupported_reason(checkpoint, structure.sizes, uniform=True)


MIXTURES = {"granitemoehybrid": GRANITE_EXPERTS, "nemotron_h": NEMOTRON_EXPERTS}


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(f"{name} with experts" for name in MIXTURES if name in FAMILIES)]
)
def test_the_parts_that_can_be_cut_are_those_that_are_not_refused(
    family: str, tmp_path: Path
) -> None:
    """By the structure's own check, and by what llama.cpp can run."""
    name, _, mixture = family.partition(" ")
    more = MIXTURES[name] if mixture else {}
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", name, **more))
    found = {part for part in SHARES if _can_cut(checkpoint, part)}
    row = ROWS[name, bool(checkpoint.family.expert_linears)]
    assert found == set(row.cuts) - {"vocabulary"}


@pytest.mark.parametrize("family", [name for name in MIXTURES if name in FAMILIES])
def test_a_model_with_experts_is_compared_with_those_of_its_family(
    family: str, tmp_path: Path
) -> None:
    """Its experts are no unknown tensors, and what models without them have is not missed."""
    folder = make_checkpoint(tmp_path / "model", family, **MIXTURES[family])
    nearest = compare_folder(folder)
    assert nearest.family == family
    assert nearest.unknown_tensors == nearest.missing_tensors == []


def test_the_command_compares_a_model_with_the_nearest_family(tmp_path: Path) -> None:
    """Settings and tensors that the family lacks, and those of its own that are missing."""
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    edit_json(folder / "config.json", model_type="qwen3_9", gate_scale=2.0)
    tensors = load_file(folder / "model.safetensors")
    for block in (0, 1):
        tensors[f"model.layers.{block}.gate.weight"] = tensors.pop(
            f"model.layers.{block}.self_attn.k_norm.weight"
        )
    save_file(tensors, folder / "model.safetensors")

    assert racdeploy("families", "--check", str(folder)).out.splitlines() == [
        "nearest: qwen3",
        "unknown settings: gate_scale",
        "unknown tensors: model.layers.*.gate.weight",
        "missing tensors: model.layers.*.self_attn.k_norm.weight",
    ]


def test_the_command_prints_every_family() -> None:
    """As a line for people, and as JSON for programs."""
    listed = racdeploy("families").out
    assert all(name in listed for name in plugins.list_names("families"))
    assert json.loads(racdeploy("families", "--json").out) == {
        "families": [asdict(row) for row in ROWS.values()]
    }

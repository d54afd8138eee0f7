"""Support for each model family, derived from the family files.

The kernels for llama.cpp support every linear that is a tensor of its own in the file; experts of a
block are one tensor there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.files.reading import read_json
from racdeploy.models import multimodal
from racdeploy.models.checkpoint import read_entries
from racdeploy.models.families import Family, star_numbers
from racdeploy.models.family_lookup import NearestFamily, find_nearest
from racdeploy.models.widths import list_axes

_ATTENTION = "full_attention"


@dataclass(frozen=True)
class FamilySupport:
    """Support for the models of a family, with or without experts.

    Args:
        models: that the family is for, in words.
        transformers: oldest version that knows the family.
        gguf: name of the architecture in llama.cpp.
        blocks: kinds of blocks.
        prunes: linears that get zeros.
        stays_dense: linears that get none.
        kernels: linears that the kernels for llama.cpp support.
        cuts: parts that can be cut so that llama.cpp still runs the model.
        onnx: exporters that were tested with the family.
    """

    family: str
    models: str
    experts: bool
    architecture: str
    transformers: str
    gguf: str
    blocks: list[str]
    prunes: list[str]
    stays_dense: list[str]
    kernels: list[str]
    cuts: list[str]
    onnx: list[str]


def compare_folder(folder: Path) -> NearestFamily:
    """Return the family nearest to a model folder, of a known architecture or not."""
    config = read_json(folder / "config.json")
    entries: Mapping[str, Any] = read_entries(folder)
    if isinstance(inner := config.get(multimodal.KEY), dict):
        config = inner
        entries = multimodal.extract_text_entries(entries)

    return find_nearest(config, set(map(star_numbers, entries)))


def describe_families() -> list[FamilySupport]:
    """Return the support for each family, in order of name.

    A family with dense and mixture-of-experts models has a second row for the latter.
    """
    rows = []
    for name in plugins.list_names("families"):
        module = plugins.load("families", name)
        models = (inspect.getdoc(module) or "").partition(":")[0]
        rows.append(_describe(name, models, module.FAMILY))
        if mixture := module.FAMILY.moe_variant:
            # Exporters list families, of which they were tested without experts.
            described = _describe(name, f"{models}, with experts", mixture)
            rows.append(replace(described, onnx=[]))
    return rows


def _describe(name: str, models: str, family: Family) -> FamilySupport:
    exporters = [
        exporter
        for exporter in plugins.list_names("onnx_exporters")
        if name in plugins.load("onnx_exporters", exporter).TESTED_FAMILIES
    ]
    return FamilySupport(
        family=name,
        models=models,
        experts=bool(family.expert_linears),
        architecture=family.architecture,
        transformers=family.min_transformers,
        gguf=family.gguf_arch,
        blocks=_list_kinds(family),
        prunes=list(family.linears),
        stays_dense=sorted(family.never_pruned),
        kernels=[linear for linear in family.linears if linear not in family.expert_linears],
        cuts=_list_cuts(family),
        onnx=exporters,
    )


def _list_kinds(family: Family) -> list[str]:
    if family.window.period:
        return [_ATTENTION, "sliding_attention"]
    if family.kind_prefixes:
        return list(family.kind_prefixes)
    if family.state and family.state.marking == "hybrid":
        return ["hybrid"]
    return [_ATTENTION]


def _feeds_forward_everywhere(family: Family) -> bool:
    """Return True if blocks of every kind have a linear from feed-forward channels to hidden."""
    block_prefixes = tuple(prefix for kind in family.kind_prefixes.values() for prefix in kind)
    return any(
        list_axes(family, f"{linear}.weight") == ("D", "F")
        for linear in family.linears
        if not linear.startswith(block_prefixes)
    )


def _list_cuts(family: Family) -> list[str]:
    """Return the parts that can be cut so that llama.cpp still runs the model."""
    if family.no_cut_reason:
        return []

    cuts = ["experts"] if family.expert_linears else []
    cuts += ["ffn"] if _feeds_forward_everywhere(family) else []
    if not family.kind_prefixes and (family.per_block_arch or not family.needs_square_queries):
        cuts += ["heads", "kv_groups"]
    if not family.window.period and not family.rope.unrotated_period:
        cuts.append("blocks")
    return [*cuts, "vocabulary"]

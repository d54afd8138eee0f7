"""Support for each model family, derived from the family files.

The kernels for llama.cpp support every linear that is a tensor of its own in the file; experts of a
block are one tensor there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.files.reading import Json, read_json
from racdeploy.models import multimodal
from racdeploy.models.checkpoint import read_entries
from racdeploy.models.families import Family, star_numbers
from racdeploy.models.family_lookup import NearestFamily, find_nearest
from racdeploy.models.widths import list_axes

_ATTENTION = "full_attention"


def compare_folder(folder: Path) -> NearestFamily:
    """Return the family nearest to a model folder, of a known architecture or not."""
    config = read_json(folder / "config.json")
    entries: Mapping[str, Any] = read_entries(folder)
    if isinstance(inner := config.get(multimodal.KEY), dict):
        config = inner
        entries = multimodal.extract_text_entries(entries)

    return find_nearest(config, set(map(star_numbers, entries)))


def describe_families() -> list[Json]:
    """Return a row for each family, in order of name, as plain values.

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
            rows.append(described | {"onnx": []})
    return rows


def _describe(name: str, models: str, family: Family) -> Json:
    return {
        "family": name,
        "models": models,
        "experts": bool(family.expert_linears),
        "architecture": family.architecture,
        "transformers": family.min_transformers,
        "gguf": family.gguf_arch,
        "blocks": _list_kinds(family),
        "prunes": list(family.linears),
        "stays_dense": sorted(family.never_pruned),
        "kernels": [linear for linear in family.linears if linear not in family.expert_linears],
        "cuts": _list_cuts(family),
        "onnx": [
            exporter
            for exporter in plugins.list_names("onnx_exporters")
            if name in plugins.load("onnx_exporters", exporter).TESTED_FAMILIES
        ],
    }


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

"""What racdeploy can do with each model family, as the family files say it.

The kernels for llama.cpp take every linear that is a matrix of its own in the file; experts of a
block lie in one tensor there.
"""

from __future__ import annotations

import inspect
from typing import Any

from racdeploy import plugins
from racdeploy.models.families import Family
from racdeploy.models.widths import axes

_ATTENTION = "full_attention"


def describe_families() -> list[dict[str, Any]]:
    """Return a row for each family, in order of name, as plain values.

    A family of which some models have experts has a second row for these.
    """
    rows = []
    for name in plugins.names("families"):
        module = plugins.load("families", name)
        models = (inspect.getdoc(module) or "").partition(":")[0]
        rows.append(_describe(name, models, module.FAMILY))
        if mixture := module.FAMILY.mixture:
            rows.append(_describe(name, f"{models}, with experts", mixture))
    return rows


def _describe(name: str, models: str, family: Family) -> dict[str, Any]:
    return {
        "family": name,
        "models": models,
        "experts": bool(family.routed),
        "architecture": family.architecture,
        "transformers": family.since,
        "gguf": family.gguf_arch,
        "blocks": _list_kinds(family),
        "prunes": list(family.linears),
        "stays_dense": sorted(family.kept),
        "kernels": [linear for linear in family.linears if linear not in family.routed],
        "cuts": _list_cuts(family),
        "onnx": _list_exporters(name),
    }


def _list_kinds(family: Family) -> list[str]:
    if family.window_period:
        return [_ATTENTION, "sliding_attention"]
    return list(family.only) or [_ATTENTION]


def _list_exporters(family: str) -> list[str]:
    exporters = plugins.names("onnx_exporters")
    return [name for name in exporters if family in plugins.load("onnx_exporters", name).PROVEN]


def _feeds_forward_everywhere(family: Family) -> bool:
    """Return whether a linear collects feed-forward channels, in blocks of every kind."""
    ends = [linear for linear in family.linears if axes(family, f"{linear}.weight") == ("D", "F")]
    some = tuple(begins for kind in family.only.values() for begins in kind)
    return any(not linear.startswith(some) for linear in ends)


def _list_cuts(family: Family) -> list[str]:
    """Return the parts that can be cut so that llama.cpp runs what is left."""
    if family.uncut:
        return []

    cuts = ["experts"] if family.routed else []
    cuts += ["ffn"] if _feeds_forward_everywhere(family) else []
    if not family.only and (family.per_block or not family.square_queries):
        cuts += ["heads", "kv_groups"]
    if not family.window_period and not family.no_rope_period:
        cuts.append("blocks")
    return [*cuts, "vocabulary"]

"""Model card of a Hub repository with bundles: metadata, a table of files, and commands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from racdeploy import plugins
from racdeploy.bundles.hub.layout import SPLIT_SUFFIX
from racdeploy.files.templates import render_text
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.report.tables import format_bytes

CARD_MARK = "<!-- written by racdeploy push -->"
"""Marker of cards that racdeploy wrote and may overwrite."""
_SPARSE_FROM = 0.1  # zeros in the file
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(repository: str, bundles: Mapping[str, Manifest]) -> str:
    """Return the README.md of a repository; ``bundles`` maps their names there to manifests."""
    ordered = dict(sorted(bundles.items()))
    manifests = ordered.values()
    entries = [entry for manifest in manifests for entry in manifest.artifacts]
    formats = sorted({entry.format for entry in entries})
    zeros = max(manifest.pruning.get("sparsity_file", 0.0) for manifest in manifests)

    return render_text(
        "racdeploy.bundles.hub",
        "card.jinja",
        licenses=[each.base["license"] for each in manifests if each.base.get("license")],
        base_models=sorted({name for each in manifests if (name := _find_base_model(each))}),
        library=plugins.read_constants("formats", formats[0])["HUB_LIBRARY"],
        tags=["racdeploy", *(["sparse"] if zeros >= _SPARSE_FROM else []), "reasoning", *formats],
        repository=repository,
        names=sorted({_plain(each.base.get("name", "a model")) for each in manifests}),
        bundles=ordered,
        has_commands=any(map(_is_stock, entries)),
        mark=CARD_MARK,
        as_json=json.dumps,
        plain=_plain,
        number=_number,
        readable_bytes=format_bytes,
        is_stock=_is_stock,
        quant_tag=_quant_tag,
    )


def _find_base_model(manifest: Manifest) -> str:
    """Return the Hub id of the base model; empty if it was a local folder."""
    name = str(manifest.base.get("model", ""))
    return name if manifest.base.get("revision") and _HUB_ID.fullmatch(name) else ""


def _is_stock(entry: ArtifactEntry) -> bool:
    """Return True if unmodified llama.cpp and Ollama run the file."""
    return entry.format == "gguf" and entry.packing == "plain"


def _quant_tag(entry: ArtifactEntry) -> str:
    """Return the number format from the file name, by which llama.cpp and Ollama select it."""
    stem = PurePosixPath(entry.path).name.removesuffix(".gguf")
    return SPLIT_SUFFIX.sub("", stem).rpartition("-")[2]


def _number(value: object, form: str = ".2f") -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _plain(value: object) -> str:
    """Return a text that is safe inside a cell or link: it comes from a stranger's manifest."""
    line = " ".join(str(value).split())
    return re.sub(r"[|<>\[\]`]", "", line)[:200]

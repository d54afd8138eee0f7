"""The card of a repository with bundles: metadata of the Hub, what there is, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from racdeploy import plugins
from racdeploy.bundles.hub.layout import NUMBERED
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.report.tables import readable_bytes
from racdeploy.storage.templates import render_text

MARK = "<!-- written by racdeploy push -->"
"""In every card that racdeploy has written, and may write again."""
_SPARSE_FROM = 0.1  # zeros in the file
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(repository: str, bundles: Mapping[str, Manifest]) -> str:
    """Return README.md of a repository with these bundles, by their names there."""
    ordered = dict(sorted(bundles.items()))
    manifests = list(ordered.values())

    rows: list[list[str]] = []
    commands: list[str] = []
    formats: set[str] = set()
    for name, manifest in ordered.items():
        rows += _rows(name, manifest)
        commands += _commands(repository, manifest)
        formats |= {entry.format for entry in manifest.artifacts}

    tags = ["racdeploy", "reasoning", *sorted(formats)]
    if any(each.pruning.get("sparsity_file", 0.0) >= _SPARSE_FROM for each in manifests):
        tags.insert(1, "sparse")

    return render_text(
        "racdeploy.bundles.hub",
        "card.jinja",
        license=_first(each.base.get("license") for each in manifests),
        base_models=_base_models(manifests),
        library=plugins.constants("formats", min(formats))["LIBRARY"],
        tags=tags,
        title=_plain(repository.partition("/")[2]),
        repository=repository,
        names=sorted({_plain(each.base.get("name", "a model")) for each in manifests}),
        rows=rows,
        commands=commands,
        quants=[each.artifacts[0].quant for each in manifests],
        mark=MARK,
        as_json=json.dumps,
    )


def _base_models(manifests: list[Manifest]) -> list[str]:
    """Return the Hub ids of the base models; one that was a folder has none."""
    found = set()
    for manifest in manifests:
        name = str(manifest.base.get("model", ""))
        if manifest.base.get("revision") and _HUB_ID.fullmatch(name):
            found.add(name)

    return sorted(found)


def _rows(name: str, manifest: Manifest) -> list[list[str]]:
    """Return a row for each artifact: what it is, and what was measured of the first."""
    dense = manifest.headline.get("dense", {})
    pruned = manifest.headline.get("pruned", {})
    rows = []

    for number, entry in enumerate(manifest.artifacts):
        first = number == 0
        measured = [
            f"{_share(pruned.get('accuracy'))} ({_share(dense.get('accuracy'))})",
            _number(manifest.headline.get("length_ratio")),
            _plain(manifest.verdict),
        ]
        link = f"[{_plain(entry.path)}]({entry.path})"
        rows.append(
            [
                link,
                _plain(entry.quant),
                readable_bytes(entry.size_bytes),
                _share(manifest.pruning.get("sparsity_file")) if first else "",
                *(measured if first else ["", "", ""]),
                f"[card](racdeploy/{name}/README.md)",
            ]
        )
    return rows


def _commands(repository: str, manifest: Manifest) -> list[str]:
    """Return how stock programs run what they can run of a bundle."""
    lines = []
    for entry in manifest.artifacts:
        if entry.format != "gguf" or entry.packing != "plain":
            continue

        tag = _tag(entry)
        context = manifest.generation.context_to_start_with
        lines.append(f"llama-server -hf {repository}:{tag} --jinja -c {context}")
        lines.append(f"ollama run hf.co/{repository}:{tag}")
    return lines


def _tag(entry: ArtifactEntry) -> str:
    """Return the number format as the file's name has it, by which programs choose."""
    stem = PurePosixPath(entry.path).name.removesuffix(".gguf")
    whole = NUMBERED.sub("", stem)

    _, _, tag = whole.rpartition("-")
    return tag


def _first(values: Any) -> str:
    for value in values:
        if value:
            return _plain(value)
    return ""


def _share(value: Any) -> str:
    return _number(value, ".1%")


def _number(value: Any, form: str = ".2f") -> str:
    if not isinstance(value, int | float):
        return "–"
    return format(value, form)


def _plain(value: object) -> str:
    """Return a text that cannot end a cell, a line or a link."""
    line = " ".join(str(value).split())
    return re.sub(r"[|<>\[\]`]", "", line)[:200]

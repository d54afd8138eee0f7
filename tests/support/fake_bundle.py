"""Bundles of a few bytes: a true manifest round files that no engine opens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from racdeploy.manifest import (
    MANIFEST_NAME,
    ArtifactEntry,
    GenerationSettings,
    Manifest,
    TokenizerEntry,
)

BASE = {"model": "acme/thinker-1B", "name": "thinker-1B", "revision": "a" * 40}
ARM = {"accuracy": 0.985, "prompts": 200}


def make_fake_bundle(
    folder: Path,
    quant: str = "q8_0",
    form: str = "gguf",
    *,
    files: dict[str, bytes] | None = None,
    **changes: Any,
) -> Path:
    """Write a bundle of some bytes and return its folder.

    Args:
        files: further files by name.
        changes: fields of the manifest.
    """
    main = (
        f"thinker-1B-rac-v1.0-{quant.upper()}.gguf"
        if form == "gguf"
        else f"onnx/model_{quant}.onnx"
    )
    seed = f"{quant} {form}".encode()
    artifacts = {main: seed * 1000}
    if form == "gguf":
        artifacts[main.replace(".gguf", ".imatrix.gguf")] = b"importance of " + seed
    else:
        artifacts[f"{main}_data"] = b"weights of " + seed

    tokenizer = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"chat_template": ""}'}
    others = {"README.md": b"# a card\n", "report.json": b"{}", "records.jsonl": b"{}\n"}
    if form == "onnx":
        others["config.json"] = b'{"model_type": "qwen3"}'
    for name, content in {**artifacts, **tokenizer, **others, **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    manifest = _describe(main, quant, form, artifacts, tokenizer).model_copy(update=changes)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


def _describe(
    main: str, quant: str, form: str, artifacts: dict[str, bytes], tokenizer: dict[str, bytes]
) -> Manifest:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in artifacts.items()}
    entry = ArtifactEntry(
        path=main,
        format=form,
        quant=quant,
        packing="plain",
        size_bytes=len(artifacts[main]),
        sha256=hashes[main],
        backend="llamacpp" if form == "gguf" else "onnxruntime",
        files=hashes,
    )
    return Manifest(
        racdeploy_version="0.1.0",
        base={**BASE, "license": "apache-2.0"},
        recipe={},
        traces={},
        pruning={"sparsity": 0.5, "sparsity_file": 0.5},
        artifacts=(entry,),
        tokenizer=TokenizerEntry(
            files={name: hashlib.sha256(text).hexdigest() for name, text in tokenizer.items()},
            template_sha256="0",
            open_tag="<think>",
            close_tag="</think>",
            eos_ids=(2,),
        ),
        generation=GenerationSettings(
            temperature=0.6, top_p=0.95, max_new_tokens=64, context_tokens=4096
        ),
        verdict="pass",
        headline={"dense": ARM, "pruned": ARM, "length_ratio": 1.01},
    )


def read_files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its path."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}

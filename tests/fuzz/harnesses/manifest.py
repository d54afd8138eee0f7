"""Manifests, as ``racdeploy.load``, ``verify`` and ``push`` read them, beside files of a bundle.

What is accepted is written and read again as the same manifest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from racdeploy.bundles.hub.push import write_card
from racdeploy.errors import RacdeployError
from racdeploy.files.toml import validate
from racdeploy.manifest import MANIFEST_NAME, Manifest
from racdeploy.models.family_lookup import find_family
from racdeploy.recipe import Recipe
from racdeploy.runtime.loading import _choose_context, check_artifact_files
from racdeploy.verification.gate import read_gate
from tests.fuzz.mutation import of_json
from tests.fuzz.oracle import expect, scratch
from tests.support.fake_bundle import make_fake_bundle

READERS = ("racdeploy.manifest", "racdeploy.runtime.loading", "racdeploy.files.reading")
_WORDS = (
    *("gguf", "onnx", "q8_0", "plain", "bitmask", "llamacpp", "onnxruntime", "tokenizer.json"),
    *("sparsity", "sparsity_file", "verify", "gate", "accuracy", "model_type", "files", "qwen3"),
    *("../secret", "thinking", "hesitation", "dense_tokenizer", "model_context_tokens", "license"),
)
mutator = of_json(_WORDS)


def target(data: bytes) -> None:
    """Read a manifest and carry out what is done with one before an engine is opened."""
    folder = _make_bundle("gguf")
    (folder / MANIFEST_NAME).write_bytes(data)
    manifest = Manifest.read(folder)

    text = manifest.model_dump_json()
    again = Manifest.model_validate_json(text)
    expect(again.model_dump_json() == text, "it is written as another manifest")

    for artifact in manifest.artifacts:
        with contextlib.suppress(RacdeployError):
            check_artifact_files(folder, manifest, artifact)
    with contextlib.suppress(RacdeployError):
        _choose_context(manifest.generation, 1 << 20)
    with contextlib.suppress(RacdeployError):
        find_family({"model_type": manifest.base.model_type})
    with contextlib.suppress(RacdeployError):
        write_card("acme/thinker", {"one": manifest})

    recipe = validate(Recipe, manifest.recipe, MANIFEST_NAME)
    read_gate(None, recipe.gate)


@cache
def _make_bundle(form: str) -> Path:
    return make_fake_bundle(scratch() / form, form=form)


def seeds() -> Iterator[bytes]:
    """Yield the manifests of two bundles, and one that says all there is to say."""
    for form in ("gguf", "onnx"):
        yield (_make_bundle(form) / MANIFEST_NAME).read_bytes()

    values = json.loads((_make_bundle("gguf") / MANIFEST_NAME).read_bytes())
    values["dense_tokenizer"] = values["tokenizer"]
    values["recipe"] = {"prune": {"sparsity": 0.5}, "gate": {"accuracy": {"margin": 0.1}}}
    values["generation"] |= {
        "max_thinking_tokens": 32,
        "model_context_tokens": 8192,
        "advised_context_tokens": 4096,
        "thinking": {"closing": "So", "hesitation": {"Wait": [5]}, "hesitation_penalty": 1.0},
    }
    yield json.dumps(values).encode()

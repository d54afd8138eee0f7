"""Instructions for other programs to run a GGUF file: Ollama's Modelfile, and the model card."""

from __future__ import annotations

import shlex
from pathlib import Path

from racdeploy import packing as packings
from racdeploy.exporting.gguf.ollama import make_go_template
from racdeploy.exporting.gguf.vocabulary import adds_bos
from racdeploy.files.templates import render_text
from racdeploy.files.unprintable import replace_unprintable
from racdeploy.manifest import ArtifactEntry, GenerationSettings, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant import importance as importances
from racdeploy.runtime.template import PromptEncoder

_OLLAMA_NAMES = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"}


def companions(manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Return an Ollama Modelfile: a Go template if possible, and context for whole thoughts."""
    entry = next(entry for entry in manifest.artifacts if entry.format == "gguf")
    encoder = PromptEncoder.from_folder(checkpoint.folder)
    # llama.cpp adds bos itself, so the template must not.
    bos = encoder.bos_token if adds_bos(checkpoint) else ""
    template, reason = make_go_template(encoder.render, bos)

    settings = manifest.generation
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    tokens = {i: text for text, i in encoder.tokenizer.get_vocab().items()}
    stops = [tokens[i] for i in manifest.tokenizer.eos_ids if i in tokens]
    text = _render(
        "Modelfile.jinja",
        entry,
        template=template,
        reason=" ".join(replace_unprintable(reason).split()),
        sampling=sampling | _read_recommended(checkpoint),
        context_tokens=settings.default_context_tokens,
        stops=list(filter(_fits_a_line, stops)),
    )

    return {"Modelfile": text}


def usage(entry: ArtifactEntry, settings: GenerationSettings) -> list[str]:
    """Return lines of the model card: how other programs run the file."""
    text = _render(
        "usage.jinja",
        entry,
        context_tokens=settings.default_context_tokens,
        control=_name_flags(settings),
    )
    return [*packings.load_gguf(entry.packing).usage(entry.path), *text.splitlines()]


def _fits_a_line(stop: str) -> bool:
    """Return True if a token can be quoted in a line of a Modelfile."""
    return (
        stop == replace_unprintable(stop)
        and "\n" not in stop
        and '"""' not in stop
        and stop[-1:] != '"'
    )


def _name_flags(settings: GenerationSettings) -> str:
    """Return llama-server's flags that control the thinking as verified; empty without control.

    Source: common/arg.cpp of llama.cpp in 2026.
    """
    control = settings.thinking
    flags = []
    if settings.max_thinking_tokens:
        flags += ["--reasoning-budget", str(settings.max_thinking_tokens)]
        if control.closing:
            flags += ["--reasoning-budget-message", control.closing.strip()]

    if control.hesitation_penalty:
        for token in control.hesitation_ids:
            flags += ["--logit-bias", f"{token}-{control.hesitation_penalty:g}"]

    return shlex.join(flags)


def _render(name: str, entry: ArtifactEntry, **values: object) -> str:
    models = {name for name in entry.files if name.endswith(".gguf")}
    importance_files = {name for name in models if name.endswith(importances.SUFFIX)}
    is_split = len(models - importance_files) > 1

    # A packed file is unpacked beside itself, under the name that programs read.
    file = f"{Path(entry.path).stem}.gguf" if entry.unpacked_sha256 else entry.path
    return render_text("racdeploy.exporting.gguf", name, file=file, is_split=is_split, **values)


def _read_recommended(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the other sampling settings that the model's authors recommend, by Ollama's names."""
    recommended = {}
    for name, ollama_name in _OLLAMA_NAMES.items():
        value = checkpoint.tokenizer.generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            recommended[ollama_name] = value
    return recommended

"""What the Hub, Ollama, LM Studio and llama.cpp expect round a GGUF file: parts, names, metadata, a
Modelfile.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import gguf
import numpy as np
import pytest

from racdeploy.bundles.inspect import inspect_path
from racdeploy.exporting import gguf as gguf_format
from racdeploy.exporting.gguf import export
from racdeploy.exporting.gguf.splits import split_into_parts
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import (
    ArtifactEntry,
    GenerationSettings,
    Manifest,
    ThinkingControl,
    TokenizerEntry,
)
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import label_size, name_artifact
from racdeploy.recipe import Recipe
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import SPECIAL_TOKENS, edit_json, make_checkpoint

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 480, 24)]
# ggml/docs/gguf.md, "Validating Above Naming Convention"
RULE = re.compile(
    r"^(?P<BaseName>[A-Za-z0-9\s]*(?:(?:-(?:(?:[A-Za-z\s][A-Za-z0-9\s]*)|(?:[0-9\s]*)))*))"
    r"-(?:(?P<SizeLabel>(?:\d+x)?(?:\d+\.)?\d+[A-Za-z](?:-[A-Za-z]+(\d+\.)?\d+[A-Za-z]+)?)(?:-(?P<FineTune>[A-Za-z0-9\s-]+))?)?"
    r"-(?:(?P<Version>v\d+(?:\.\d+)*))(?:-(?P<Encoding>(?!LoRA|vocab)[\w_]+))?(?:-(?P<Type>LoRA|vocab))?"
    r"(?:-(?P<Shard>\d{5}-of-\d{5}))?\.gguf$"
)
ZEROS = "0" * 64


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=3))


@pytest.mark.parametrize("split_bytes", [1, 40_000, 100_000])
def test_parts_load_in_llama_and_compute_the_same(
    checkpoint: Checkpoint, tmp_path: Path, split_bytes: int
) -> None:
    """llama.cpp opens the first part and gives the logits of the single file, bit for bit."""
    whole = export(checkpoint, tmp_path / "whole.gguf", quant="q8_0")
    parts = export(checkpoint, tmp_path / "m.gguf", quant="q8_0", split_bytes=split_bytes)
    assert len(parts.files) > 1
    assert parts.path.name == f"m-00001-of-{len(parts.files):05d}.gguf"
    assert {name: file_sha256(tmp_path / name) for name in parts.files} == parts.files
    assert parts.size_bytes == sum((tmp_path / name).stat().st_size for name in parts.files)
    assert parts.tensors == whole.tensors
    assert not (tmp_path / "m.gguf").exists()
    first, second = ask_llama([whole.path, parts.path], IDS)
    np.testing.assert_array_equal(first.logits_TV, second.logits_TV)
    assert [row.name for row in inspect_path(parts.path).tensors] == [t.name for t in whole.tensors]


def test_parts_have_the_keys_of_gguf_split(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Number, count and all tensors in every part, with ``gguf-split``'s types; the rest is in the
    first one.
    """
    result = export(checkpoint, tmp_path / "m.gguf", quant="f16", split_bytes=60_000)
    kinds = {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}
    held = 0
    for number, name in enumerate(sorted(result.files)):
        reader = gguf.GGUFReader(tmp_path / name)
        values = {key: reader.fields[key].contents() for key in kinds}
        assert values == {
            "split.no": number,
            "split.count": len(result.files),
            "split.tensors.count": len(result.tensors),
        }
        assert {key: reader.fields[key].types[0].name for key in kinds} == kinds
        assert ("tokenizer.ggml.tokens" in reader.fields) == (number == 0)
        held += len(reader.tensors)
    assert held == len(result.tensors)


def test_a_small_model_is_one_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The default is above what any of these models has; 0 never splits."""
    assert Recipe.combine(None, {}).export.split_bytes < 50e9
    for split_bytes in (0, 48_000_000_000):
        result = export(checkpoint, tmp_path / "m.gguf", quant="f16", split_bytes=split_bytes)
        assert list(result.files) == ["m.gguf"]
        assert "split.count" not in gguf.GGUFReader(result.path).fields


def test_no_part_is_larger_than_asked_unless_one_tensor_is() -> None:
    """Tensors stay in order and whole."""
    plan = [
        GgufTensorPlan(str(i), "", (size,), "f32", "f32", "")
        for i, size in enumerate([10, 1, 1, 50, 1])
    ]
    sizes = [[tensor.size_bytes for tensor in part] for part in split_into_parts(plan, 48)]
    assert sizes == [[40, 4, 4], [200], [4]]


@pytest.mark.parametrize(
    ("parameters", "label"),
    [
        (135_000_000, "135M"),
        (1_540_000_000, "1.5B"),
        (3_490_000, "3.5M"),
        (7_000_000_000, "7B"),
        (900, "0.9K"),
    ],
)
def test_sizes_are_named_as_people_name_them(parameters: int, label: str) -> None:
    """One digit behind the point below ten, and none where it is zero."""
    assert label_size(parameters) == label


@pytest.mark.parametrize("model", ["tiny-reasoner", "SmolLM2-135M-Instruct"])
@pytest.mark.parametrize("quant", ["q8_0", "sparse-q4"])
def test_file_names_follow_the_rule(tmp_path: Path, model: str, quant: str) -> None:
    """Base, size, fine-tune, version and encoding are where the specification's own expression
    finds them.
    """
    folder = model if model == "tiny-reasoner" else str(make_checkpoint(tmp_path / model, "llama"))
    options = {"model": folder, "prune": {"sparsity": 0.5}, "export": {"quant": quant}}
    job = Job(Recipe.combine(None, options))
    for name in (f"{name_artifact(job)}.gguf", f"{name_artifact(job)}-00001-of-00002.gguf"):
        match = RULE.match(name)
        assert match, name
        assert match["Version"] == "v1.0"
        assert match["SizeLabel"] == ("3.3M" if model == "tiny-reasoner" else "135M")
        assert (match["FineTune"] or "").endswith("rac-50")
        assert match["Encoding"] == job.recipe.export.quant.upper()


def test_general_keys_say_what_the_file_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Who made it, what it is for, and the languages of the model card in either of the forms that
    YAML has.
    """
    for front in ("language: en", "language:\n- en\n- de", "language: [en, de]"):
        (checkpoint.folder / "README.md").write_text(f"---\n{front}\nlicense: mit\n---\n# Model\n")
        asked = {
            "racdeploy.sparsity": 0.5,
            "general.base_model.count": 1,
            "general.base_model.0.name": "Base",
        }
        file = export(
            Checkpoint(checkpoint.folder), tmp_path / "m.gguf", quant="f16", metadata=asked
        ).path
        fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
        assert fields["general.languages"] == (["en"] if front == "language: en" else ["en", "de"])
        assert fields["general.tags"] == ["text-generation", "racdeploy", "sparse"]
        assert fields["general.quantized_by"].startswith("racdeploy ")
        assert {key: fields[key] for key in asked} == asked


def _manifest(path: str, files: dict[str, str]) -> Manifest:
    entry = ArtifactEntry(
        path=path,
        format="gguf",
        quant="q8_0",
        packing="plain",
        size_bytes=1,
        sha256=ZEROS,
        backend="llamacpp",
        files=files,
    )
    return Manifest(
        racdeploy_version="0",
        base={"name": "tiny"},
        recipe={},
        traces={},
        pruning={},
        artifacts=(entry,),
        tokenizer=TokenizerEntry(
            files={},
            template_sha256=ZEROS,
            open_tag=None,
            close_tag=None,
            eos_ids=(SPECIAL_TOKENS["<|im_end|>"],),
        ),
        generation=GenerationSettings(
            temperature=0.6,
            top_p=0.95,
            max_new_tokens=64,
            max_thinking_tokens=None,
            context_tokens=256,
            advised_context_tokens=16_384,
        ),
        verdict="none",
        headline={},
    )


def test_the_modelfile_gives_a_thought_room(checkpoint: Checkpoint) -> None:
    """Context and length are those that the manifest advises, not those of the verification; the
    authors' sampling is kept.
    """
    edit_json(
        checkpoint.folder / "generation_config.json",
        top_k=20,
        repetition_penalty=1.05,
        do_sample=True,
    )
    manifest = _manifest("m.gguf", {"m.gguf": ZEROS})
    written = gguf_format.companions(manifest, Checkpoint(checkpoint.folder), checkpoint.folder)[
        "Modelfile"
    ]
    start, template, parameters = written.split('"""')
    assert start == "FROM ./m.gguf\nTEMPLATE "
    assert template.startswith(
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}<|im_start|>system\n'
    )
    assert template.endswith("{{ end }}{{ end }}<think>\n")
    assert parameters.splitlines() == [
        "",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.05",
        "PARAMETER num_ctx 16384",
        "PARAMETER num_predict 16384",
        'PARAMETER stop "<|im_end|>"',
    ]


def test_a_template_without_a_counterpart_is_said_so(checkpoint: Checkpoint) -> None:
    """A Modelfile without a template would make Ollama ask the bare question, without a word."""
    loop = "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}"
    (checkpoint.folder / "chat_template.jinja").write_text(loop, encoding="utf-8")
    manifest = _manifest("m.gguf", {"m.gguf": ZEROS})
    written = gguf_format.companions(manifest, Checkpoint(checkpoint.folder), checkpoint.folder)[
        "Modelfile"
    ]
    assert "TEMPLATE" not in written
    assert (
        "# Ollama has no counterpart of the chat template (it writes a message differently"
        in written
    )


def test_several_files_are_explained(checkpoint: Checkpoint) -> None:
    """The Modelfile and the card say what to do; an importance matrix is no part."""
    name = "m-00001-of-00002.gguf"
    manifest = _manifest(
        name, {name: ZEROS, "m-00002-of-00002.gguf": ZEROS, "m.imatrix.gguf": ZEROS}
    )
    assert "--merge" in gguf_format.companions(manifest, checkpoint, checkpoint.folder)["Modelfile"]
    assert any(
        "several files" in line
        for line in gguf_format.usage(manifest.artifacts[0], manifest.generation)
    )
    single = _manifest("m.gguf", {"m.gguf": ZEROS, "m.imatrix.gguf": ZEROS})
    assert (
        "--merge" not in gguf_format.companions(single, checkpoint, checkpoint.folder)["Modelfile"]
    )
    assert not any(
        "several files" in line
        for line in gguf_format.usage(single.artifacts[0], single.generation)
    )


def test_the_card_has_the_flags_of_thinking_under_control() -> None:
    """As a shell takes them; without control there is no such line."""
    manifest = _manifest("m.gguf", {"m.gguf": ZEROS})
    (entry,) = manifest.artifacts
    assert "flags" not in "".join(gguf_format.usage(entry, manifest.generation))

    control = ThinkingControl(
        closing="\n\nI must answer now.\n", hesitation={"Wait": (7, 9)}, hesitation_penalty=2.5
    )
    settings = manifest.generation.model_copy(
        update={"max_thinking_tokens": 512, "thinking": control}
    )
    (line,) = (each for each in gguf_format.usage(entry, settings) if "flags" in each)
    assert shlex.split(line.split("`")[1]) == [
        *("--reasoning-budget", "512", "--reasoning-budget-message", "I must answer now."),
        *("--logit-bias", "7-2.5", "--logit-bias", "9-2.5"),
    ]
    assert line.endswith("it takes the bias in the answer, too")

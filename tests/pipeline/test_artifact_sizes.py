"""The size of a file is known to the byte before it is written, and before its model is cut."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from racdeploy import exporting
from racdeploy.exporting.gguf import export
from racdeploy.exporting.gguf.sizes import FileSizes
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.artifact_sizes import SizePredictor
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import list_metadata
from racdeploy.pipeline.structure import expect_shape
from racdeploy.pruning.structures import vocabulary
from racdeploy.pruning.walk.assemble import CutShape, assemble_zero_filled
from racdeploy.quant import presets
from racdeploy.recipe import Recipe
from tests.support.cut_models import cut_checkpoint
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

# Attention, experts, a piece tokenizer, windows, and blocks without attention.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "tied": False},
    "qwen3": {},
    "gemma3_text": {"pre_tokenizer": "gemma"},
    "qwen3_moe": {},
    "lfm2": {},
}
QUANTS = ("q8_0", "q4_k_m", "q2_k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks, wide enough for blocks of 256."""
    folder = tmp_path_factory.mktemp("sizes") / "tiny-thinker"
    return make_checkpoint(
        folder, "qwen3", hidden_size=256, intermediate_size=768, num_hidden_layers=4
    )


def make_job(folder: Path, target: str = "gguf", **parts: dict[str, Any]) -> Job:
    """Return the job of a recipe that cuts only what it says."""
    parts.setdefault("structure", {"keep": {}})
    return Job(Recipe.combine(None, {"model": str(folder), "target": target, **parts}))


def cut_channels(job: Job, out: Path, moved: int = 0) -> Path:
    """Write the cut model; so many channels more stay in the first block, and fewer in the last."""
    shape = expect_shape(job.checkpoint.shape, job.structure)
    channels = list(shape.widths["intermediate_size"])
    channels[0] += moved
    channels[-1] -= moved
    heads = job.checkpoint.shape.integer("num_attention_heads")
    return cut_checkpoint(job.model.folder, out, [(heads, count) for count in channels])


@pytest.mark.parametrize("family", CASES)
def test_a_dense_file_is_as_large_as_predicted(family: str, tmp_path: Path) -> None:
    """In one number format and in a mix, with metadata, and in several files."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", family, **CASES[family]))
    sizes = FileSizes(checkpoint)
    metadata: dict[str, Any] = {
        "racdeploy.sparsity": 0.5,
        "general.name": "a name",
        "general.base_model.count": 1,
    }

    for number, quant in enumerate(QUANTS):
        split_bytes = 50_000 if number else 0
        plan = sizes.plan(presets.read(quant), metadata, split_bytes)
        out = tmp_path / f"{quant}.gguf"
        written = export(checkpoint, out, quant=quant, metadata=metadata, split_bytes=split_bytes)
        assert sizes.size_bytes(plan) == written.size_bytes
        assert bool(number) == (len(plan.tensors_by_file) > 1)


def test_a_size_is_another_with_other_words() -> None:
    """The name in the file is some of its bytes: the tensors are not all that is compared."""
    sizes = FileSizes(Checkpoint(Path(exporting.__file__).parents[1] / "models" / "tiny_reasoner"))
    short, long = (
        sizes.size_bytes(sizes.plan(presets.read("q8_0"), {"racdeploy.base_model": "x" * count}))
        for count in (1, 65)
    )
    assert long - short == 64


@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
@pytest.mark.parametrize("moved", [32, -64])
def test_a_cut_model_is_as_large_as_predicted(
    folder: Path, quant: str, moved: int, tmp_path: Path
) -> None:
    """Whatever widths pruning gives its blocks, of the sum that was asked for."""
    job = make_job(folder, export={"quant": quant}, structure={"keep": {"ffn": 0.75}})
    size = SizePredictor(tmp_path / "sketches").predict(job)

    cut = Checkpoint(cut_channels(job, tmp_path / "cut", moved))
    metadata = list_metadata(job, cut)
    written = export(cut, tmp_path / "cut.gguf", quant=quant, metadata=metadata)
    assert size.size_bytes == size.plain_bytes == written.size_bytes

    # Spoiled: a channel that is not there shows.
    other = make_job(folder, export={"quant": quant}, structure={"keep": {"ffn": 0.5}})
    assert SizePredictor(tmp_path / "others").predict(other).size_bytes != written.size_bytes


def test_blocks_that_stay_and_equal_widths_are_exact(folder: Path, tmp_path: Path) -> None:
    """A mix, too, where pruning leaves no choice of widths."""
    structure = {"keep": {"ffn": 1 / 3, "blocks": 0.5}, "uniform": True}
    job = make_job(folder, export={"quant": "q4_k_m"}, structure=structure)
    size = SizePredictor(tmp_path / "sketches").predict(job)

    heads = job.checkpoint.shape.integer("num_attention_heads")
    cut = Checkpoint(cut_checkpoint(folder, tmp_path / "cut", [(heads, 256)] * 2, [1, 3]))
    written = export(cut, tmp_path / "x.gguf", quant="q4_k_m", metadata=list_metadata(job, cut))
    assert size.size_bytes == written.size_bytes


def _narrow(dense: Checkpoint, channels: Sequence[int]) -> CutShape:
    sizes = zip(dense.shape.sizes, channels, strict=True)
    blocks = tuple(range(len(channels)))
    return CutShape(blocks, [{**own, "F": left} for own, left in sizes])


def test_a_sketch_is_the_cut_model_without_its_values(folder: Path, tmp_path: Path) -> None:
    """Names, shapes and config are those that pruning writes; no block of the disk is taken."""
    dense = Checkpoint(folder)
    heads = dense.shape.widths["num_attention_heads"]
    channels = (256, 512, 512, 256)
    shape = _narrow(dense, channels)

    cut = Checkpoint(cut_checkpoint(folder, tmp_path / "cut", [*zip(heads, channels, strict=True)]))
    drawn = Checkpoint(assemble_zero_filled(dense, tmp_path / "drawn", shape))
    assert drawn.raw_config == cut.raw_config
    shapes = [{name: each.shape for name, each in one.entries.items()} for one in (cut, drawn)]
    assert shapes[0] == shapes[1]
    assert not np.any(drawn.read_raw(drawn.shape.prunable_weights[0]))

    file = tmp_path / "drawn" / "model.safetensors"
    assert file.stat().st_blocks * 512 < file.stat().st_size / 4


def test_fewer_tokens_are_counted_by_their_texts(folder: Path, tmp_path: Path) -> None:
    """A hollow folder with a cut vocabulary gives the size of the true one."""
    checkpoint = Checkpoint(folder)
    old_ids = vocabulary.choose(checkpoint, 480, ())
    made = vocabulary.rewrite(checkpoint, old_ids, tmp_path / "made")
    hollow = vocabulary.rewrite(checkpoint, old_ids, tmp_path / "hollow", zero_filled=True)

    metadata = {"general.name": "the same"}
    written = export(Checkpoint(made), tmp_path / "x.gguf", quant="q4_0", metadata=metadata)
    sizes = FileSizes(Checkpoint(hollow))
    assert sizes.size_bytes(sizes.plan(presets.read("q4_0"), metadata)) == written.size_bytes


def test_a_packed_file_is_an_expectation(folder: Path, tmp_path: Path) -> None:
    """Near what is packed of a model whose smallest weights are zeros."""
    job = make_job(folder, export={"quant": "q8_0", "packing": "bitmask"}, prune={"sparsity": 0.5})
    size = SizePredictor(tmp_path).predict(job)
    assert (
        size.plain_bytes == SizePredictor(tmp_path).predict(make_job(folder, **_PLAIN)).size_bytes
    )

    # Written, with the smallest weights as zeros: a table packs the codes a little better.
    checkpoint = job.checkpoint
    sparse = shutil.copytree(folder, tmp_path / "sparse")
    weights = load_file(sparse / "model.safetensors")
    for name in checkpoint.shape.prunable_weights:
        magnitude = weights[name].float().abs()
        weights[name][magnitude < magnitude.median()] = 0
    save_file(weights, sparse / "model.safetensors", {"format": "pt"})
    written = exporting.write(Checkpoint(sparse), tmp_path / "x.racgguf", job.recipe.export)
    assert 0.9 * size.size_bytes < written.size_bytes <= 1.02 * size.size_bytes


_PLAIN: dict[str, Any] = {"export": {"quant": "q8_0"}, "prune": {"sparsity": 0.5}}


def test_what_no_format_holds_is_refused(tmp_path: Path) -> None:
    """As the writer would refuse it, hours later."""
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    checkpoint = Checkpoint(folder)
    drawn = assemble_zero_filled(checkpoint, tmp_path / "drawn", _narrow(checkpoint, (32, 64)))
    config = drawn / "config.json"
    config.write_text(config.read_text().replace(widths.KEY, "another_key"))
    with raises("wrong-tensor-shape"):
        FileSizes(Checkpoint(drawn)).plan(presets.read("q8_0"))


def test_a_token_reads_all_but_the_rows_of_the_embedding(tmp_path: Path) -> None:
    """An embedding that is the head counts, one beside a head does not; of experts, those used."""
    for tied in (True, False):
        model = make_checkpoint(tmp_path / f"tied {tied}", "qwen3", tied=tied)
        size = SizePredictor(tmp_path).predict(make_job(model, prune={"sparsity": 0.0}))
        embedding = sum(t.size_bytes for t in size.tensors if t.name == "token_embd.weight")
        whole = sum(tensor.size_bytes for tensor in size.tensors)
        assert sum(size.read_bytes.values()) == whole - (0 if tied else embedding)

    model = make_checkpoint(tmp_path / "experts", "qwen3_moe")
    for target in ("gguf", "onnx"):
        size = SizePredictor(tmp_path).predict(make_job(model, target, prune={"sparsity": 0.0}))
        assert sum(size.read_bytes.values()) < 0.8 * size.size_bytes


def test_a_head_that_is_the_embedding_is_counted_once_in_a_graph(tmp_path: Path) -> None:
    """Also where the checkpoint stores it twice, which exporters do not."""
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    once = SizePredictor(tmp_path).predict(make_job(folder, target="onnx"))

    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, {"format": "pt"})
    twice = SizePredictor(tmp_path).predict(make_job(folder, target="onnx"))
    assert (twice.size_bytes, twice.read_bytes) == (once.size_bytes, once.read_bytes)

"""An importance matrix chooses scales, and is written and read as llama.cpp does it."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.quant.importance import Importance
from tests.support.errors import raises
from tests.support.llama_quantize import quantize
from tests.support.tiny_models import make_checkpoint

TOKENS = 1234


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with rows of 256 weights, as pruning leaves it: with an importance."""
    folder = tmp_path_factory.mktemp("importance") / "model"
    make_checkpoint(folder, "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    generator = np.random.default_rng(0)
    tensors = {}
    for name, entry in Checkpoint(folder).entries.items():
        if name.endswith("proj.weight"):
            tensors[name] = np.exp(generator.standard_normal(entry.shape[1])).astype(np.float32)
            tensors[f"{name}.tokens"] = np.array([TOKENS], dtype=np.float64)
    tensors["model.layers.1.mlp.down_proj.weight"][:64] = 0  # inputs that were never active
    save_file(tensors, folder / IMPORTANCE_FILE)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def read_bytes(file: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor."""
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}


def test_scales_are_chosen_and_the_result_says_so(folder: Path, tmp_path: Path) -> None:
    """The linears' bytes differ from an export without it; the embedding, of which nothing is
    known, is the same.
    """
    with_it = export(Checkpoint(folder), tmp_path / "with.gguf", quant="q4_0")
    without = export(Checkpoint(folder), tmp_path / "without.gguf", quant="q4_0", importance="none")
    assert (
        "scales of 14 of 15 quantized matrices are chosen by the importance of their inputs"
        in with_it.notes
    )
    assert not [note for note in without.notes if "importance" in note]
    first, second = read_bytes(with_it.path), read_bytes(without.path)
    changed = [name for name in first if first[name] != second[name]]
    linears = [name for name in first if name.startswith("blk.") and "norm" not in name]
    assert changed == linears


@pytest.mark.parametrize("preset", ["q4_k_m", "q6_k", "q4_0", "q5_0", "q8_0"])
def test_bytes_equal_llama_model_quantize(folder: Path, tmp_path: Path, preset: str) -> None:
    """llama.cpp's own quantization of the same file with the same importance gives the same
    bytes.
    """
    checkpoint = Checkpoint(folder)
    ours = export(checkpoint, tmp_path / "ours.gguf", quant=preset)
    source = export(checkpoint, tmp_path / "f32.gguf", quant="f32")
    known = Importance.read(folder / IMPORTANCE_FILE)
    matrix = {}
    for tensor in source.tensors:
        mean_I = known.for_weight(tensor.name, tensor.source, tensor.shape[-1])
        if mean_I is not None:
            matrix[tensor.name] = mean_I
    llama = quantize(source.path, tmp_path / "llama.gguf", preset.upper(), matrix)
    expected, found = read_bytes(llama), read_bytes(ours.path)
    if preset != "q4_k_m":  # a plain number format keeps 8 bits in the embedding
        expected.pop("token_embd.weight")
        found.pop("token_embd.weight")
    assert found == expected
    unweighted = quantize(source.path, tmp_path / "plain.gguf", preset.upper())
    is_same = read_bytes(unweighted)["blk.0.ffn_down.weight"] == expected["blk.0.ffn_down.weight"]
    assert is_same == (preset == "q8_0"), "ggml rounds to Q8_0 without it"


def test_the_file_of_llama_cpp_is_written(folder: Path, tmp_path: Path) -> None:
    """Names, types, shapes and keys as ``tools/imatrix`` writes them; sums over counts give the
    means.
    """
    result = export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0")
    assert set(result.files) == {"m.gguf", "m.imatrix.gguf"}
    assert result.size_bytes == result.path.stat().st_size
    reader = gguf.GGUFReader(tmp_path / "m.imatrix.gguf")
    keys = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["racdeploy calibration"],
        "imatrix.chunk_count": 1,
        "imatrix.chunk_size": TOKENS,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    statistic = load_file(folder / IMPORTANCE_FILE)
    for tensor in result.tensors:
        if tensor.source not in statistic:
            assert f"{tensor.name}.in_sum2" not in tensors
            continue
        sums, counts = tensors[f"{tensor.name}.in_sum2"], tensors[f"{tensor.name}.counts"]
        assert [sums.tensor_type, counts.tensor_type] == [gguf.GGMLQuantizationType.F32] * 2
        assert [list(sums.shape), list(counts.shape)] == [[tensor.shape[-1], 1], [1, 1]]
        # one product and one division in float32
        np.testing.assert_allclose(
            sums.data[0] / counts.data[0], statistic[tensor.source], rtol=2e-7
        )


def test_a_file_of_llama_cpp_is_read(folder: Path, tmp_path: Path) -> None:
    """An imatrix given by path chooses the same scales as the statistic that it was made of, up to
    its rounding.
    """
    export(Checkpoint(folder), tmp_path / "m.gguf", quant="q4_0")
    (folder / IMPORTANCE_FILE).unlink()
    again = export(
        Checkpoint(folder),
        tmp_path / "n.gguf",
        quant="q4_0",
        importance=str(tmp_path / "m.imatrix.gguf"),
    )
    assert set(again.files) == {"n.gguf"}  # somebody's own file is not written again
    first, second = (
        np.frombuffer(b"".join(read_bytes(tmp_path / f"{n}.gguf").values()), np.uint8) for n in "mn"
    )
    assert np.mean(first != second) < 1e-3


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (
            lambda t: t.update(
                {"model.layers.0.mlp.up_proj.weight": np.full(256, np.nan, np.float32)}
            ),
            "importance-not-finite",
            ["up_proj.weight"],
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.full(256, -1, np.float32)}),
            "importance-not-finite",
            ["up_proj.weight"],
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones(255, np.float32)}),
            "importance-of-other-model",
            ["256", "255"],
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.up_proj.weight": np.ones((1, 256), np.float32)}
            ),
            "damaged-importance",
            ["up_proj.weight"],
        ),
        (
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight.tokens"),
            "damaged-importance",
            ["up_proj.weight"],
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight.tokens": np.zeros(1)}),
            "damaged-importance",
            ["0.0"],
        ),
        (lambda t: t.clear(), "no-importance-matrix", []),
    ],
)
def test_a_damaged_statistic_is_refused(
    folder: Path, tmp_path: Path, change: object, code: str, values: list[str]
) -> None:
    """Nothing is written."""
    tensors = load_file(folder / IMPORTANCE_FILE)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / IMPORTANCE_FILE)
    with raises(code, *values):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="q4_0")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_matrix_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """So is a file that is not there, and one that is no matrix."""
    export(Checkpoint(folder), tmp_path / "m.gguf", quant="f16", importance="none")
    tensors = {
        f"other.{name}": value for name, value in load_file(folder / IMPORTANCE_FILE).items()
    }
    save_file(tensors, tmp_path / "other.safetensors")
    for name, code in (
        ("other.safetensors", "importance-of-other-model"),
        ("m.gguf", "no-importance-matrix"),
        ("none.gguf", "no-importance-file"),
    ):
        with raises(code, name):
            export(
                Checkpoint(folder),
                tmp_path / "n.gguf",
                quant="q4_0",
                importance=str(tmp_path / name),
            )


@pytest.mark.parametrize("place", [0, 3, 8, 16, 24, 40, 200, -30])
def test_a_cut_matrix_is_refused(folder: Path, tmp_path: Path, place: int) -> None:
    """Wherever it ends."""
    export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0")
    matrix = tmp_path / "m.imatrix.gguf"
    matrix.write_bytes(matrix.read_bytes()[:place])
    with raises("damaged-gguf", str(matrix)):
        Importance.read(matrix)

"""GGUF files of models whose parts were cut: stock llama.cpp opens them and computes the same."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from racdeploy import quant as quants
from racdeploy.engines.backends.transformers import TransformersEngine
from racdeploy.engines.backends.transformers.torch_model import GgmlRounding
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import ExportResult
from racdeploy.exporting import gguf as gguf_format
from racdeploy.exporting.gguf import export, list_linears, measure, unsupported_reason
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.verification.probe_strings import read_probe_strings
from tests.support.cut_models import Cut, cut_checkpoint, pad_checkpoint
from tests.support.errors import raises
from tests.support.llama_child import LlamaAnswer, ask_llama
from tests.support.llama_quantize import quantize
from tests.support.more import selected, some
from tests.support.real_server import llama_cpp_server, running
from tests.support.tiny_models import LLAMA3, YARN, make_checkpoint

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 480, 96)]
UNIFORM: Cut = [(2, 64)] * 3
DIFFERENT: Cut = [(4, 64), (2, 96), (2, 64)]
WIDE: Cut = [(4, 512), (2, 256), (4, 256)]
ALIGNED = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 128}


@dataclass(frozen=True)
class Case:
    """A model, what is left of it, and the architecture of its file."""

    family: str
    arch: str
    cut: Cut
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("llama", "deci", DIFFERENT),
    "llama uniform": Case("llama", "llama", UNIFORM),
    "llama untied biased": Case(
        "llama", "deci", DIFFERENT, {"tied": False, "attention_bias": True, "mlp_bias": True}
    ),
    "llama llama3 rope": Case("llama", "deci", DIFFERENT, {"rope_scaling": LLAMA3}),
    "llama wide heads": Case("llama", "deci", DIFFERENT, {"head_dim": 32}),
    "llama channels alone": Case("llama", "deci", [(4, 64), (4, 96), (4, 64)]),
    "llama heads alone": Case("llama", "deci", [(4, 96), (2, 96), (2, 96)]),
    "mistral": Case("mistral", "deci", DIFFERENT, {"tied": False}),
    "qwen2": Case("qwen2", "deci", DIFFERENT, {"rope_theta": 1_000_000.0}),
    "qwen2 untied yarn": Case("qwen2", "deci", DIFFERENT, {"tied": False, "rope_scaling": YARN}),
    "qwen2 uniform": Case("qwen2", "deci", UNIFORM),
    "qwen2 uniform channels": Case("qwen2", "qwen2", [(4, 64)] * 3),
    "qwen3": Case("qwen3", "openelm", DIFFERENT),
    "qwen3 yarn": Case("qwen3", "openelm", DIFFERENT, {"rope_scaling": YARN}),
    "qwen3 uniform untied": Case("qwen3", "qwen3", UNIFORM, {"tied": False}),
    "granite uniform": Case("granite", "granite", UNIFORM),
    "smollm3 uniform": Case("smollm3", "smollm3", [(2, 64)] * 4, {"num_hidden_layers": 4}),
    "phi 3 uniform channels": Case("phi3", "phi3", [(4, 64)] * 3),
    "ernie": Case("ernie4_5", "deci", DIFFERENT, {"tied": False}),
    "seed oss uniform": Case("seed_oss", "seed_oss", UNIFORM),
    "hunyuan uniform": Case("hunyuan_v1_dense", "hunyuan-dense", UNIFORM),
    "glm 4 uniform": Case("glm4", "glm4", UNIFORM),
    "exaone 4 uniform channels": Case(
        "exaone4", "exaone4", [(4, 64)] * 3, {"layer_types": ["full_attention"] * 3}
    ),
    "gemma3 uniform": Case("gemma3_text", "gemma3", UNIFORM),
}
# One of each family and architecture in every run.
_ALWAYS = {(case.family, case.arch): name for name, case in reversed(CASES.items())}.values()


@dataclass(frozen=True)
class Measured:
    """A cut model and its file, beside the whole model with zeros in the place of what is cut."""

    cut: Path
    file: Path
    padded_file: Path
    answer: LlamaAnswer
    padded: LlamaAnswer


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Measured]:
    """Export every case to F32, cut and filled up with zeros, and run all in one child process."""
    root = tmp_path_factory.mktemp("widths")
    folders, files = [], []
    chosen = {name: CASES[name] for name in selected(request, "name") if name in CASES}
    for name, case in chosen.items():
        whole = make_whole(root / f"{name} whole", case.family, **case.config)
        cut = cut_checkpoint(whole, root / name, case.cut)
        padded = pad_checkpoint(whole, root / f"{name} padded", case.cut)
        folders.append(cut)
        for folder in (cut, padded):
            files.append(export(Checkpoint(folder), folder.with_suffix(".gguf"), quant="f32").path)

    answers = ask_llama(files, IDS, read_probe_strings())
    rows = zip(folders, files[::2], files[1::2], answers[::2], answers[1::2], strict=True)
    return {name: Measured(*row) for name, row in zip(chosen, rows, strict=True)}


def make_whole(folder: Path, family: str, **config: Any) -> Path:
    return make_checkpoint(folder, family, **{"num_hidden_layers": 3} | config)


def make_cut(folder: Path, family: str, cut: Cut = DIFFERENT, **config: Any) -> Checkpoint:
    whole = make_whole(folder.with_name(f"{folder.name} whole"), family, **config)
    return Checkpoint(cut_checkpoint(whole, folder, cut))


def run_torch(folder: Path) -> np.ndarray:
    engine = TransformersEngine(folder, EngineSettings(context_tokens=256, parallel=1, threads=1))
    return engine.logits(IDS, rounding=GgmlRounding())


def read_fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def find_error(found_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    return float(np.abs(found_TV - expected_TV).max() / np.abs(expected_TV).max())


@pytest.mark.parametrize("name", some(CASES, _ALWAYS))
def test_logits_equal_torch(measured: dict[str, Measured], name: str) -> None:
    """An F32 file with an F32 cache gives torch's logits.

    As for whole models: errors of float32 sums are near 1e-6, 1e-4 leaves room for processors.
    ggml takes Gemma's GELU from a table; an input between two of its numbers, 2^-11 apart, may get
    the other one.
    """
    limit = 2e-3 if name.startswith("gemma3") else 1e-4
    assert find_error(measured[name].answer.logits_TV, run_torch(measured[name].cut)) < limit


@pytest.mark.parametrize("name", some(CASES, _ALWAYS))
def test_logits_equal_those_of_zeros_in_the_familys_own_architecture(
    measured: dict[str, Measured], name: str
) -> None:
    """The architecture for different widths computes what the usual one does with zeros."""
    found, case = measured[name], CASES[name]
    usual = Checkpoint(found.cut).family.gguf_arch
    assert read_fields(found.padded_file)["general.architecture"] == usual

    limit = 2e-3 if case.family == "gemma3_text" else 1e-4
    assert find_error(found.answer.logits_TV, found.padded.logits_TV) < limit


@pytest.mark.parametrize("name", some(CASES, _ALWAYS))
def test_the_header_says_how_wide_each_block_is(measured: dict[str, Measured], name: str) -> None:
    """One number where all blocks are alike, as everywhere, and a list where they are not."""
    case = CASES[name]
    fields = read_fields(measured[name].file)
    assert fields["general.architecture"] == case.arch

    for key, values in zip(
        ("attention.head_count", "feed_forward_length"), zip(*case.cut, strict=True), strict=True
    ):
        expected = list(values) if len(set(values)) > 1 else values[0]
        assert fields[f"{case.arch}.{key}"] == expected
    assert fields[f"{case.arch}.attention.head_count_kv"] == 2


@pytest.mark.parametrize("name", some(CASES, _ALWAYS))
def test_all_else_in_the_header_is_that_of_the_family(
    measured: dict[str, Measured], name: str
) -> None:
    """Tokens, template, rope scaling and the rest are those of the file with zeros.

    ``deci`` and ``openelm`` state three settings that other architectures derive.
    """
    found = measured[name]
    cut, padded = read_fields(found.file), read_fields(found.padded_file)
    usual = padded["general.architecture"]
    translated = {key.replace(f"{usual}.", f"{CASES[name].arch}.", 1): key for key in padded}
    different = {
        key
        for key in translated.keys() | cut.keys()
        if cut.get(key) != padded.get(translated.get(key, ""))
    }

    allowed = {"architecture", "name", "tensor_count", "kv_count", "head_count"}
    allowed |= {"feed_forward_length", "key_length", "value_length", "dimension_count"}
    allowed |= {"vocab_size"}
    assert {key.rpartition(".")[2] for key in different} <= allowed
    assert found.answer.tokens == found.padded.tokens
    assert found.answer.ends == found.padded.ends

    tokenizer = Tokenizer.from_file(str(found.cut / "tokenizer.json"))
    encoded = tokenizer.encode_batch(read_probe_strings(), add_special_tokens=False)
    assert found.answer.tokens == [encoding.ids for encoding in encoded]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_blocks_that_are_left_out_are_renumbered(tmp_path: Path, family: str) -> None:
    """Gemma's windows go along, in the list that its architecture takes."""
    whole = make_checkpoint(tmp_path / "whole", family, num_hidden_layers=6)
    folder = cut_checkpoint(whole, tmp_path / "small", [(4, 96)] * 4, (0, 2, 3, 5))
    result = export(Checkpoint(folder), tmp_path / "small.gguf", quant="f32")

    (answer,) = ask_llama([result.path], IDS)
    limit = 2e-3 if family == "gemma3_text" else 1e-4
    assert find_error(answer.logits_TV, run_torch(folder)) < limit


@pytest.mark.parametrize(("family", "arch"), [("qwen2", "deci"), ("qwen3", "openelm")])
def test_another_architecture_is_reported(tmp_path: Path, family: str, arch: str) -> None:
    """Programs show the architecture, so the report says why it is not the expected one."""
    result = export(make_cut(tmp_path / "cut", family), tmp_path / "cut.gguf", quant="q8_0")
    (found,) = result.deviations
    assert (found.subject, found.requested, found.actual) == ("architecture", family, arch)
    assert found.reason == (
        f"llama.cpp takes one width for all blocks of {family}; "
        f"under the name {arch}, its code computes this same model"
    )
    assert read_fields(result.path)["racdeploy.architecture"] == f"{family}: {found.reason}"
    restored = ExportResult.from_json(tmp_path, json.loads(json.dumps(result.to_json(tmp_path))))
    assert restored == result

    even = export(
        make_cut(tmp_path / "even", family, [(4, 64)] * 3), tmp_path / "e.gguf", quant="q8_0"
    )
    assert not even.deviations


@pytest.mark.parametrize("quant", some(("q8_0", "q4_0", "q4_k", "q3_k"), kept=("q4_0", "q3_k")))
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_quantized_rows_are_those_of_their_parts(tmp_path: Path, family: str, quant: str) -> None:
    """Each row is coded by itself, so q, k and v may lie in one tensor; llama.cpp runs the file."""
    checkpoint = make_cut(tmp_path / "cut", family, WIDE, **ALIGNED)
    result = export(checkpoint, tmp_path / "cut.gguf", quant=quant)
    usual = {t.name: t for t in result.tensors}
    form = quants.load(quant)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(result.path).tensors}

    for block, (heads, _) in enumerate(WIDE):
        prefix = f"model.layers.{block}.self_attn"
        parts = [checkpoint.read(f"{prefix}.{part}_proj.weight") for part in "qkv"]
        names = [f"blk.{block}.attn_{part}.weight" for part in "qkv"]
        if family == "qwen3":
            parts, names = [np.concatenate(parts)], [f"blk.{block}.attn_qkv.weight"]
        for number, (part_OI, name) in enumerate(zip(parts, names, strict=True)):
            if family != "qwen3" and number < 2:
                part_OI = interleave(part_OI, (heads, 2)[number])
            expected_OI = form.dequantize(form.quantize(part_OI), part_OI.shape[1])
            found = stored[name]
            np.testing.assert_array_equal(
                gguf.dequantize(found.data, found.tensor_type), expected_OI
            )
            assert usual[name].actual_quant == quant
            assert usual[name].shape == part_OI.shape

    (answer,) = ask_llama([result.path], IDS)
    assert np.isfinite(answer.logits_TV).all()


def interleave(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """Lay rows i and K/2 + i of each head beside each other, as llama.cpp pairs them."""
    O, I = weight_OI.shape
    halves = weight_OI.reshape(heads, 2, O // heads // 2, I)
    rows = [
        halves[head, half, pair]
        for head in range(heads)
        for pair in range(halves.shape[2])
        for half in (0, 1)
    ]
    return np.stack(rows)


@pytest.mark.parametrize(
    "preset", some(("Q8_0", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q3_K_M"), kept=("Q8_0", "Q4_K_M"))
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_cpps_own_quantizer_takes_the_file(tmp_path: Path, family: str, preset: str) -> None:
    """It gives each tensor the type that we do, and the file it makes computes what ours does.

    Q8_0 is the same code in both. In the others ours and llama.cpp's choose other scales.
    """
    checkpoint = make_cut(tmp_path / "cut", family, WIDE, **ALIGNED)
    plain = export(checkpoint, tmp_path / "f32.gguf", quant="f32").path
    ours = export(checkpoint, tmp_path / "ours.gguf", quant=preset.lower()).path
    theirs = quantize(plain, tmp_path / "theirs.gguf", preset)

    types = []
    for file in (ours, theirs):
        types.append({t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors})
    assert types[0] == types[1]

    one, other = ask_llama([ours, theirs], IDS)
    assert find_error(one.logits_TV, other.logits_TV) < (1e-6 if preset == "Q8_0" else 0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parts_and_packed_files_hold_the_same(tmp_path: Path, family: str) -> None:
    """Several files compute what the one does, and what a container stands for is the one."""
    checkpoint = make_cut(tmp_path / "cut", family, dtype="float32")
    weights = load_file(checkpoint.folder / "model.safetensors")
    for name, weight_OI in weights.items():
        if name.endswith("proj.weight"):
            weight_OI[:, ::2] = 0
    save_file(weights, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(checkpoint.folder)

    whole = export(checkpoint, tmp_path / "whole.gguf", quant="q8_0")
    parts = export(checkpoint, tmp_path / "parts.gguf", quant="q8_0", split_bytes=50_000)
    assert len(parts.files) > 1
    one, several = ask_llama([whole.path, parts.path], IDS)
    np.testing.assert_array_equal(one.logits_TV, several.logits_TV)

    packed = export(checkpoint, tmp_path / "whole.racgguf", quant="q8_0", packing="bitmask")
    plain = gguf_format.unpack(packed.path, tmp_path / "unpacked.gguf")
    assert file_sha256(plain) == whole.sha256
    prunable = list_linears(checkpoint.family, *measure(packed.path))
    linears = [tensor for tensor in packed.tensors if tensor.name in prunable]
    assert {t.packing for t in linears} == {"bitmask"}
    assert {t.source.rpartition(".")[2] for t in linears} == {"weight"}
    assert all(t.zeros >= 0.5 for t in linears)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_codes_that_pruning_chose_stay(tmp_path: Path, family: str) -> None:
    """Weights on the grid of q4_0 are stored as they are, with an importance of their inputs too.

    q, k and v have one input, so one importance is for all three.
    """
    checkpoint = make_cut(tmp_path / "cut", family, dtype="float32")
    form, random = quants.load("q4_0"), np.random.default_rng(0)
    weights = load_file(checkpoint.folder / "model.safetensors")
    means: dict[str, np.ndarray] = {}
    for name, weight_OI in weights.items():
        if name.endswith("proj.weight"):
            columns = weight_OI.shape[1]
            weights[name] = form.dequantize(form.quantize(weight_OI), columns)
            shared = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            drawn_I = random.random(columns, dtype=np.float32) + 0.1
            means[name] = means.get(shared, drawn_I)
            means[f"{name}.tokens"] = np.array([7.0])
    save_file(weights, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    save_file(means, checkpoint.folder / IMPORTANCE_FILE)
    checkpoint = Checkpoint(checkpoint.folder)

    result = export(checkpoint, tmp_path / "cut.gguf", quant="q4_0")
    plain = export(checkpoint, tmp_path / "f32.gguf", quant="f32", importance="none").path
    exact = {t.name: t.data for t in gguf.GGUFReader(plain).tensors}
    for tensor in gguf.GGUFReader(result.path).tensors:
        if tensor.tensor_type.name == "Q4_0":
            found_OI = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(found_OI, exact[tensor.name])

    count = sum(t.actual_quant == "q4_0" for t in result.tensors)
    assert f"scales of {count} of {count + 1} quantized" in " ".join(result.notes)
    matrix = {t.name for t in gguf.GGUFReader(tmp_path / "cut.imatrix.gguf").tensors}
    assert ("blk.1.attn_qkv.weight.in_sum2" in matrix) == (family == "qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_server_answers_with_the_file(tmp_path: Path, family: str) -> None:
    """The server in llama-cpp-python decodes what torch does, token after token."""
    checkpoint = make_cut(tmp_path / "cut", family, initializer_range=0.4)
    file = export(checkpoint, tmp_path / "cut.gguf", quant="f32").path
    settings = EngineSettings(context_tokens=256, parallel=1, threads=1)
    engine = TransformersEngine(checkpoint.folder, settings)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    question = "Ann has 12 apples and buys 30 more."
    (expected,) = engine.generate([tokenizer.encode(question).ids], Sampling(8, checkpoint.eos_ids))

    asked = {"prompt": question, "max_tokens": 8, "temperature": 0.0, "top_k": 1}
    with running(*llama_cpp_server(file)) as (address, _):
        request = urllib.request.Request(
            f"{address}/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]

    answered = tokenizer.decode(expected.ids)
    assert len(set(expected.ids)) > 3
    assert text.replace("\ufffd", "") == answered.replace("\ufffd", "")  # parts of characters


def test_patterns_name_tensors_as_in_the_familys_own_file(tmp_path: Path) -> None:
    """A recipe need not know that q, k and v are one tensor; it gets the most bits of theirs."""
    checkpoint = make_cut(tmp_path / "cut", "qwen3")

    def choose(**tensors: str) -> tuple[str, str, str]:
        result = export(checkpoint, tmp_path / "m.gguf", quant="q5_0", tensors=tensors)
        (found,) = [t for t in result.tensors if t.name == "blk.0.attn_qkv.weight"]
        return found.requested_quant, found.actual_quant, found.reason

    shared = "q, k and v are one tensor, which gets the most bits of the three"
    assert choose(attn_v="q8_0") == ("q5_0", "q8_0", shared)
    assert choose(attn_v="q4_0") == ("q4_0", "q5_0", shared)
    assert choose(attn_="q4_0") == ("q4_0", "q4_0", "")
    assert choose(attn_qkv="q4_0") == ("q4_0", "q4_0", "")
    with raises("pattern-matches-nothing", "attn_w"):
        choose(attn_w="q4_0")


def test_a_width_that_no_quant_block_divides_has_a_reason(tmp_path: Path) -> None:
    checkpoint = make_cut(tmp_path / "cut", "llama", [(4, 72), (2, 96), (4, 64)])
    result = export(checkpoint, tmp_path / "cut.gguf", quant="q8_0")
    reasons = {t.name: (t.actual_quant, t.reason) for t in result.tensors if "ffn_down" in t.name}
    why = "rows of 72 weights do not divide into quant blocks of 32"
    assert reasons == {
        "blk.0.ffn_down.weight": ("f16", why),
        "blk.1.ffn_down.weight": ("q8_0", ""),
        "blk.2.ffn_down.weight": ("q8_0", ""),
    }
    (answer,) = ask_llama([result.path], IDS)
    assert np.isfinite(answer.logits_TV).all()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "untied qwen3": ("qwen3", {"tied": False}, "no output projection of its own"),
    "biased qwen3": ("qwen3", {"attention_bias": True}, "has no biases"),
    "gemma3": ("gemma3_text", {}, "one width for all blocks of gemma3"),
    "granite": ("granite", {}, "one width for all blocks of granite"),
    "phi 3": ("phi3", {}, "one width for all blocks of phi3"),
    "smollm3": ("smollm3", {}, "one width for all blocks of smollm3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_without_a_door_are_refused_before_any_work(name: str, tmp_path: Path) -> None:
    """The dense model is enough to know, and a model that is there nevertheless is refused too."""
    family, config, why = REFUSED[name]
    whole = Checkpoint(make_whole(tmp_path / "whole", family, **config))
    for sizes in ({"F"}, {"Q"}, {"F", "Q"}):
        assert why in unsupported_reason(whole, sizes, uniform=False)
    assert unsupported_reason(whole, {"V"}, uniform=False) == ""
    assert unsupported_reason(whole, {"F"}, uniform=True) == ""

    folder = cut_checkpoint(whole.folder, tmp_path / "cut", DIFFERENT)
    with raises("unsupported-cut", why, "structure.uniform = true"):
        export(Checkpoint(folder), tmp_path / "cut.gguf", quant="f16")
    assert not (tmp_path / "cut.gguf").exists()


@pytest.mark.parametrize("name", some(CASES, _ALWAYS))
def test_what_can_be_written_is_not_refused(measured: dict[str, Measured], name: str) -> None:
    case = CASES[name]
    heads, channels = zip(*case.cut, strict=True)
    sizes = {"Q"} if min(heads) < 4 else set()
    sizes |= {"F"} if min(channels) < 96 else set()
    whole = Checkpoint(measured[name].cut.with_name(f"{name} whole"))
    assert unsupported_reason(whole, sizes, Checkpoint(measured[name].cut).shape.is_uniform) == ""


def test_phi_3_keeps_its_heads(tmp_path: Path) -> None:
    whole = Checkpoint(make_whole(tmp_path / "whole", "phi3"))
    why = unsupported_reason(whole, {"Q"}, uniform=True)
    assert "together as wide as a phi3 model" in why

    folder = cut_checkpoint(whole.folder, tmp_path / "cut", UNIFORM)
    with raises("unsupported-cut", why):
        export(Checkpoint(folder), tmp_path / "cut.gguf", quant="f16")


def test_the_largest_gemma_keeps_heads_and_blocks(tmp_path: Path) -> None:
    """llama.cpp knows it by its 62 blocks, and then scales by hidden size and number of heads."""
    config = {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}
    whole = Checkpoint(make_whole(tmp_path / "whole", "gemma3_text", **config))
    for size in ("Q", "L"):
        assert "by 62 blocks" in unsupported_reason(whole, {size}, uniform=True)
    assert unsupported_reason(whole, {"F"}, uniform=True) == ""

    export(whole, tmp_path / "whole.gguf", quant="q8_0")
    cut = cut_checkpoint(whole.folder, tmp_path / "cut", [(4, 96)] * 61, tuple(range(61)))
    with raises("unsupported-by-llama-cpp", "query_pre_attn_scalar"):
        export(Checkpoint(cut), tmp_path / "cut.gguf", quant="q8_0")


def test_a_file_that_says_another_width_does_not_open(tmp_path: Path) -> None:
    """llama.cpp compares each tensor with the widths of its block."""
    checkpoint = make_cut(tmp_path / "cut", "llama")
    config = json.loads((checkpoint.folder / "config.json").read_text())
    config["racdeploy_block_widths"]["intermediate_size"] = [64, 64, 96]
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    with raises("wrong-tensor-shape", "layers.1.mlp.gate_proj"):
        export(Checkpoint(checkpoint.folder), tmp_path / "cut.gguf", quant="f16")

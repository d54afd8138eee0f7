"""Damaged and hostile model folders are errors with a place, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from racdeploy.exporting.gguf.tokens import fill_gaps
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant.stored_codes import CODED_FILE, UNCODED_FILE, join_codes
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries
from tests.support.commands import racdeploy
from tests.support.errors import raises
from tests.support.tiny_models import edit_json, make_checkpoint


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is made before a test is measured: the first one imports transformers."""
    return make_checkpoint(tmp_path_factory.mktemp("made") / "model", "qwen3", dtype="float32")


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(healthy, tmp_path / "model")


def test_reads_what_safetensors_reads(folder: Path) -> None:
    """Our reader and the reference library agree on every tensor."""
    checkpoint = Checkpoint(folder)
    for name, value in load_file(folder / "model.safetensors").items():
        assert np.array_equal(value, checkpoint.read(name)), name


def _rewrite_header(file: Path, change: Callable[[dict], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"
# Whoever loads it runs os.system.
_PICKLE = b"cposix\nsystem\n(S'touch ran'\ntR."
ATTACKS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[:-100]),
    "empty": lambda f: f.write_bytes(b""),
    "seven bytes": lambda f: f.write_bytes(b"1234567"),
    "huge header": lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]),
    "header is a list": lambda f: f.write_bytes((2).to_bytes(8, "little") + b"[]" + bytes(64)),
    "header is not JSON": lambda f: f.write_bytes((4).to_bytes(8, "little") + b"{{{{" + bytes(64)),
    "deep header": lambda f: f.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
    "shape too large": lambda f: _rewrite_header(f, lambda h: h[NORM].update(shape=[10**9, 10**9])),
    "negative shape": lambda f: _rewrite_header(f, lambda h: h[NORM].update(shape=[-8, -8])),
    "range before the data": lambda f: _rewrite_header(
        f, lambda h: h[NORM].update(data_offsets=[-256, 0])
    ),
    "range behind the file": lambda f: _rewrite_header(
        f, lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 256])
    ),
    "unknown dtype": lambda f: _rewrite_header(f, lambda h: h[NORM].update(dtype="F4")),
    "entry is a number": lambda f: _rewrite_header(f, lambda h: h.update({NORM: 3})),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_damaged_weights_are_a_model_error(folder: Path, attack: str) -> None:
    """Every way to damage the file ends in an error that names it."""
    ATTACKS[attack](folder / "model.safetensors")
    code = "unsupported-dtype" if attack == "unknown dtype" else "damaged-safetensors"
    with raises(code, "model.safetensors"):
        _ = Checkpoint(folder).entries


@pytest.mark.parametrize(
    "names",
    [("w|q4_0|code_OI",), ("w|q4_0|scale_OX",), ("w|q4_0|x|scale_OX",),
     ("w|f16|code_OI", "w|f16|scale_OX"), ("w|q9_9|code_OI", "w|q9_9|scale_OX")],
)  # fmt: skip
def test_damaged_codes_are_a_model_error(folder: Path, names: tuple[str, ...]) -> None:
    """Fields that are missing, a name too long, a format without codes, and one of nobody."""
    (folder / "model.safetensors").unlink()
    arrays = {name: np.zeros((2, 1), np.float32) for name in names}
    save_file(arrays, folder / CODED_FILE)
    save_file({}, folder / UNCODED_FILE)
    with raises("damaged-codes", "build it again"):
        _ = Checkpoint(folder).entries


_CODED = {
    "w|q3_k|code_OI": np.zeros((2, 128), np.uint8),
    "w|q3_k|scale_OX": np.zeros((2, 1), np.float16),
    "w|q3_k|step_code_OG": np.zeros((2, 16), np.uint8),
    "w|q3_k|weight_OI": np.zeros((2, 256), np.float32),
}


@pytest.mark.parametrize(
    "change",
    [
        {"code_OI": np.zeros((2, 256), np.uint8)},
        {"code_OI": np.zeros((1, 128), np.uint8)},
        {"code_OI": np.zeros((2, 128), np.float32)},
        {"scale_OX": np.zeros((2, 1), np.uint8)},
        {"scale_OX": np.zeros(2, np.float16)},
        {"step_code_OG": np.zeros((1, 16), np.uint8)},
        {"step_code_OG": np.zeros((2, 16), np.float16)},
        {"weight_OI": np.zeros((2, 128), np.float32)},
        {"weight_OI": np.zeros((2, 256), np.uint8)},
        {"minimum_code_OG": np.zeros((2, 16), np.uint8)},
        {"zero_point": np.zeros((2, 16), np.uint8)},
        {"step_code_OG": None},
    ],
    ids=str,
)
def test_fields_of_other_shapes_are_a_model_error(tmp_path: Path, change: dict) -> None:
    """Or a name that the format lacks, or bytes in place of numbers."""
    changed = _CODED | {f"w|q3_k|{name}": values for name, values in change.items()}
    file = tmp_path / CODED_FILE
    save_file(_CODED, file)
    assert join_codes(read_tensor_entries(file))["w"].read().shape == (2, 256)

    save_file({name: values for name, values in changed.items() if values is not None}, file)
    with raises("damaged-codes", "'w|q3_k'"):
        join_codes(read_tensor_entries(file))


def test_a_code_that_the_format_lacks_is_a_model_error(tmp_path: Path) -> None:
    """Q3_K has 8 values, of which two codes lie in a byte."""
    file = tmp_path / CODED_FILE
    fields = {name: values for name, values in _CODED.items() if "weight_OI" not in name}
    save_file(fields | {"w|q3_k|code_OI": np.full((2, 128), 0x80, np.uint8)}, file)
    stored = join_codes(read_tensor_entries(file))["w"]
    for read in (stored.read, stored.read_packed):
        with raises("damaged-codes", "codes that q3_k lacks"):
            read()


@pytest.mark.parametrize("left_bytes", [0, 60])
def test_a_file_that_shrinks_is_not_copied_short(tmp_path: Path, left_bytes: int) -> None:
    """As where another program writes it again meanwhile."""
    file = tmp_path / "shrunk"
    file.write_bytes(bytes(left_bytes))
    with pytest.raises(AssertionError, match="shrank"):
        list(TensorEntry(file, 0, 100, "U8", (100,)).iter_bytes())


def test_an_index_cannot_name_files_outside(tmp_path: Path) -> None:
    """A shard is a plain file name."""
    folder = make_checkpoint(tmp_path / "model", "llama", sharded=True)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][NORM] = "../secret.safetensors"
    index.write_text(json.dumps(values))
    with raises("shard-outside-folder", "'../secret.safetensors'"):
        _ = Checkpoint(folder).entries


@pytest.mark.parametrize(
    ("file", "change", "code", "value"),
    [
        ("config.json", {"model_type": "mamba"}, "unknown-family", "'mamba'"),
        (
            "config.json",
            {"num_hidden_layers": "two"},
            "damaged-config",
            "num_hidden_layers",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": None},
            "no-chat-template",
            ".jinja",
        ),
    ],
)
def test_what_is_wrong_in_the_configs_is_named(
    folder: Path, file: str, change: dict, code: str, value: str
) -> None:
    """Unsupported, mistyped and missing settings are different messages."""
    edit_json(folder / file, **change)
    with raises(code, value):
        _use(folder)


def _use(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    _ = (checkpoint.shape.block_count, checkpoint.tokenizer.chat_template)


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    """No folder, no config, no tokenizer: each says so."""
    with raises("no-model-folder", str(tmp_path / "nowhere")):
        Checkpoint(tmp_path / "nowhere")
    (folder / "tokenizer.json").unlink()
    with raises("no-tokenizer", str(folder)):
        _ = Checkpoint(folder).tokenizer.file
    (folder / "config.json").write_text("{")
    with raises("invalid-json", str(folder / "config.json")):
        Checkpoint(folder)


def test_a_tie_that_the_file_contradicts_is_refused(tmp_path: Path) -> None:
    """Loaders disagree about such a file, so nobody can export it right."""
    folder = make_checkpoint(tmp_path / "model", "qwen2", tied=False)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with raises("tied-head-differs", "lm_head.weight"):
        _ = Checkpoint(folder).tied


_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "me/code--modeling_own.Own"}
_FILES = "configuration_own.py, me/code--modeling_own.py"


def test_code_of_an_unknown_architecture_is_refused_by_name(folder: Path) -> None:
    """The message names its files; they are not even there."""
    edit_json(folder / "config.json", model_type="own", auto_map=_CODE)
    with raises("unknown-family", "'own'", _FILES):
        Checkpoint(folder)


def test_code_beside_a_known_architecture_is_ignored_and_said(folder: Path) -> None:
    """Published models have both; ours is the class that transformers has, and a note says so."""
    trap = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    (folder / "configuration_own.py").write_text(trap)
    (folder / "tokenization_own.py").write_text(trap)
    before = Checkpoint(folder)
    assert before.notes == ()

    edit_json(folder / "config.json", auto_map=_CODE)
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]}
    )
    model, tokenizer = Checkpoint(folder).notes
    assert f"({_FILES}), which is not run" in model
    assert "(tokenization_own.py), which is not run" in tokenizer

    done = racdeploy("export", folder, "--quant", "f32", "--out", folder / "out.gguf")
    assert done.code == 0, done.err
    shown = " ".join(done.err.split())
    assert model in shown
    assert tokenizer in shown
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_is_code_alone_is_refused_by_name(folder: Path) -> None:
    """Without tokenizer.json its author's code would have to run."""
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]}
    )
    (folder / "tokenizer.json").unlink()
    with raises("no-tokenizer", "tokenization_own.py"):
        _ = Checkpoint(folder).tokenizer.file


@pytest.mark.parametrize(
    "mapped",
    [
        True,
        "x",
        5,
        ["a.B", 3, None],
        {"AutoModel": {"a": "b"}},
        {"A": [[["a.B"]]]},
        {"A": "x" * 999},
    ],
    ids=repr,
)
def test_an_odd_auto_map_is_no_crash(folder: Path, mapped: object) -> None:
    """Whatever it holds, it is short and ignored beside a known architecture."""
    edit_json(folder / "config.json", auto_map=mapped)
    (note,) = Checkpoint(folder).notes
    assert len(note) < 300


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.PTH", "last.ckpt", "all.pkl"]
)
def test_weights_in_a_pickle_are_refused_by_name(folder: Path, name: str) -> None:
    """The file is named and not opened, and the next step is a command."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(_PICKLE)
    with raises("pickled-weights", name) as refused:
        _ = Checkpoint(folder).entries

    assert str(refused.value.remedy).count("save_pretrained('converted')") == 1
    assert not (folder / "ran").exists()


def test_a_pickle_in_the_place_of_safetensors_is_not_loaded(folder: Path) -> None:
    """Neither under the name of the one file nor as a shard that an index names."""
    (folder / "model.safetensors").write_bytes(_PICKLE)
    with raises("damaged-safetensors", "model.safetensors"):
        _ = Checkpoint(folder).entries

    (folder / "pytorch_model.bin").write_bytes(_PICKLE)
    index = {"weight_map": {NORM: "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with raises("damaged-index", "'pytorch_model.bin'"):
        _ = Checkpoint(folder).entries


def test_a_pickle_beside_safetensors_is_left_alone(folder: Path) -> None:
    """As training_args.bin, which many folders have."""
    (folder / "training_args.bin").write_bytes(_PICKLE)
    assert Checkpoint(folder).notes == ()
    assert NORM in Checkpoint(folder).entries


def test_a_token_that_many_others_precede_is_found_at_once() -> None:
    """Two ids for one text, the last of a large vocabulary."""
    texts = {i: f"t{min(i, 99_998)}" for i in range(100_000)}
    with raises("unsupported-tokenizer", "'t99998'"):
        fill_gaps(texts, len(texts))

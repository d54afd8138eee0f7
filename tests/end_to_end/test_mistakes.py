"""Mistakes that people make, typed as they type them: what a message says, and the exit code.

A good message says what is wrong, where and why, and the command that comes next.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from tests.support.commands import find_error_code
from tests.support.tiny_models import edit_json, make_checkpoint

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Mistake:
    """A command line in a folder that was prepared for it, and what its message has to say.

    Args:
        error: code of the error; empty where the message is typer's.
        words: values that it names, and commands.
    """

    command: str
    error: str
    words: tuple[str, ...]
    prepare: Prepare = lambda folder: None
    code: int = 2
    next_step: str = "→ "


def _write(name: str, text: str | bytes) -> Prepare:
    content = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(content)


def _make_adapter(folder: Path) -> None:
    (folder / "lora").mkdir()
    base = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "peft_type": "LORA"}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(base))
    (folder / "lora" / "adapter_model.safetensors").write_bytes(b"")


def _make_nested(folder: Path) -> None:
    (folder / "run" / "checkpoint-500").mkdir(parents=True)
    (folder / "run" / "checkpoint-500" / "config.json").write_text("{}")


def _make_model(folder: Path) -> None:
    make_checkpoint(folder / "model", "qwen2")


def _make_silent_model(folder: Path) -> None:
    """Leave the tags to the tokenizer alone."""
    _make_model(folder)
    config = folder / "model" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    edit_json(config, chat_template=template)


def _below_0(command: str) -> Mistake:
    """What typer says of a number out of its range; the words of the range change with it."""
    verb, *_, option, _ = command.split()
    return Mistake(
        command, "", (f"Invalid value for '{option}'", "0"), next_step=f"racdeploy {verb} -h"
    )


PROBLEM = '{"question": "2 + 2?", "answer": 4}\n'
THREE = "".join(PROBLEM.replace("2 +", f"{number} +") for number in range(3))

MISTAKES = {
    "zeros that the number format loses": Mistake(
        "build --quant iq4_nl --sparsity 0.5 --dry-run",
        "zeros-would-be-lost",
        ("iq4_nl", "q8_0", "--allow-losing-zeros", "--keep ffn=0.75"),
    ),
    "a mix that names no tensor": Mistake(
        "build --set 'export.tensors={nothing=\"q8_0\"}' --dry-run",
        "pattern-matches-nothing",
        ("'nothing'", "blk.0.ffn_down.weight"),
    ),
    "an importance that is not there": Mistake(
        "build --quant q4_0 --set 'export.importance=\"none.gguf\"' --dry-run",
        "no-importance-file",
        ("none.gguf",),
    ),
    "a rounding that a format cannot have": Mistake(
        "build --quant f16 --set 'export.rounding=\"optimized\"' --dry-run",
        "no-optimized-rounding",
        ("q_proj", "f16", "q4_0"),
    ),
    "threads below 0": _below_0("build --dry-run --threads -2"),
    "threads below 0 for run": _below_0("run bundle hello --threads -1"),
    "threads below 0 for verify": _below_0("verify bundle --threads -1"),
    "a budget below 0": _below_0("run bundle hello --max-thinking-tokens -3"),
    "a seed below 0": _below_0("run bundle hello --seed -1"),
    "a temperature below 0": _below_0("run bundle hello --temperature -1"),
    "a verb that is mistyped": Mistake(
        "biuld", "", ("No such command 'biuld'", "Did you mean 'build'?"), next_step="racdeploy -h"
    ),
    "an option that is mistyped": Mistake(
        "build --sparcity 0.5",
        "",
        ("No such option: --sparcity", "--sparsity"),
        next_step="racdeploy build -h",
    ),
    "per cent": Mistake(
        "build --dry-run --sparsity 60",
        "invalid-settings",
        ("the command line: prune.sparsity", "got '60'", "did you mean 0.6?"),
    ),
    "all of the weights": Mistake(
        "build --dry-run --sparsity 1",
        "invalid-settings",
        ("the command line: prune.sparsity", "got '1'", "racdeploy init"),
    ),
    "a pattern the wrong way round": Mistake(
        "build --dry-run --pattern 4:2",
        "invalid-settings",
        ("prune.pattern", "2:4", "got '4:2'", "racdeploy init"),
    ),
    "a number format of another program": Mistake(
        "build --dry-run --quant int4", "unknown-plugin", ("'int4'", "q4_0", "sparse_q4")
    ),
    "traces of another kind": Mistake(
        "build --dry-run --calibration cot",
        "invalid-settings",
        ("calibration.source", "'rac' or 'prompt'", "'cot'"),
    ),
    "two files for one engine": Mistake(
        "build --dry-run --target gguf --more-targets laptop-x86",
        "targets-share-engine",
        (
            "gguf",
            "laptop-x86",
            "llamacpp",
            "--more-targets laptop-x86",
            "--quant NAME --out FOLDER",
        ),
    ),
    "a GGUF file as the model": Mistake(
        "build model.gguf",
        "gguf-not-model",
        ("Hugging Face folder", "inspect model.gguf"),
        _write("model.gguf", b"GGUF\3\0\0\0"),
    ),
    "weights as the model": Mistake(
        "build model.safetensors",
        "no-model-folder",
        ("config.json",),
        _write("model.safetensors", b"12345678"),
    ),
    "a bundle as the model": Mistake(
        "build bundle",
        "bundle-not-model",
        ('racdeploy run bundle "…"', "racdeploy verify bundle", "dense model"),
        lambda folder: [(folder / "bundle").mkdir(), _write("bundle/racdeploy.json", "{}")(folder)],
    ),
    "an adapter as the model": Mistake(
        "build lora",
        "adapter-not-model",
        ("Qwen/Qwen3-0.6B", "merge_and_unload()", "from_pretrained('lora')"),
        _make_adapter,
    ),
    "an empty folder as the model": Mistake(
        "build empty",
        "no-config",
        ("config.json", "empty", "save_pretrained", "Hub id"),
        lambda folder: (folder / "empty").mkdir(),
    ),
    "the folder above the model": Mistake(
        "build run",
        "no-config",
        ("config.json", "run/checkpoint-500"),
        _make_nested,
    ),
    "three problems": Mistake(
        "build --dry-run --tasks jsonl:three.jsonl",
        "no-problems-for-split",
        ("3 questions: 3 for calibration, 0 for evaluation", "20 different ones"),
        _write(
            "three.jsonl",
            PROBLEM.replace("2 + 2", "25 + 2")
            + PROBLEM.replace("2 + 2", "8 + 2")
            + PROBLEM.replace("2 + 2", "1 + 2"),
        ),
    ),
    "one problem three hundred times": Mistake(
        "build --dry-run --tasks jsonl:same.jsonl",
        "no-problems-for-split",
        ("299 of its 300 lines", "20 different ones"),
        _write("same.jsonl", 300 * PROBLEM),
    ),
    "a file as the task": Mistake(
        "build --dry-run --tasks three.jsonl",
        "file-as-task",
        ("--tasks jsonl:three.jsonl",),
        _write("three.jsonl", THREE),
    ),
    "a table as the task": Mistake(
        "build --dry-run --tasks data.csv",
        "table-as-task",
        (".jsonl", "csv.DictReader"),
    ),
    "a benchmark as the task": Mistake(
        "build --dry-run --tasks gsm8k",
        "task-needs-questions",
        ("hub:gsm8k", "gsm8k:PATH"),
    ),
    "wrong keys": Mistake(
        "build --dry-run --tasks jsonl:keys.jsonl",
        "missing-question",
        ("keys.jsonl:1", "prompt, gold", '{"question": "…"'),
        _write("keys.jsonl", '{"prompt": "2 + 2?", "gold": 4}'),
    ),
    "a file of another encoding": Mistake(
        "build --dry-run --tasks jsonl:latin.jsonl",
        "text-not-utf8",
        ("latin.jsonl", "byte 16", "iconv -f latin1 -t utf8 latin.jsonl"),
        _write("latin.jsonl", '{"question": "Größe?", "answer": 4}'.encode("latin-1")),
    ),
    "TOML that is none": Mistake(
        "build --dry-run --recipe bad.toml",
        "invalid-toml",
        ("bad.toml", "at line 2, column 12", "racdeploy init"),
        _write("bad.toml", "[prune]\nsparsity = half\n"),
    ),
    "a margin in points": Mistake(
        "build --dry-run --gate five.toml",
        "invalid-settings",
        ("five.toml: accuracy.margin", "got 5", "did you mean 0.05?", "racdeploy init --gate"),
        _write("five.toml", "[accuracy]\nmargin = 5\n"),
    ),
    "a trace server that is down": Mistake(
        "build --dry-run --trace-server http://127.0.0.1:9/v1 --work work",
        "server-unreachable",
        ("127.0.0.1:9",),
        code=4,
    ),
    "a gate that is not there": Mistake(
        "build --dry-run --gate nope.toml",
        "missing-toml-file",
        ("racdeploy init --gate nope.toml",),
    ),
    "a recipe that is not there": Mistake(
        "build --dry-run --recipe nope.toml",
        "missing-toml-file",
        ("racdeploy init nope.toml",),
    ),
    "nothing to inspect": Mistake("inspect nope.gguf", "path-not-found", ("nope.gguf",)),
    "nothing to run": Mistake("run nope hello", "no-such-folder", ("nope", "racdeploy build")),
    "nothing to verify": Mistake("verify nope", "no-such-folder", ("nope", "racdeploy build")),
    "a torn GGUF file to run": Mistake(
        "run model.gguf hello",
        "damaged-gguf",
        ("model.gguf", "copy or export it again"),
        _write("model.gguf", b"GGUF\3\0\0\0"),
    ),
    "a model folder to run": Mistake(
        "run model hello", "not-a-bundle", ("racdeploy build model",), _make_model
    ),
    "a file to verify": Mistake(
        "verify notes.txt",
        "not-a-bundle",
        ("notes.txt", "racdeploy.json", "racdeploy build"),
        _write("notes.txt", "mine"),
    ),
    "no question": Mistake("run bundle", "no-question", ('racdeploy run bundle "What is 2 + 2?"',)),
    "an empty question": Mistake(
        "run bundle ''", "no-question", ('racdeploy run bundle "What is 2 + 2?"',)
    ),
    "a recipe into no folder": Mistake(
        "init nowhere/x.toml", "missing-parent-folder", ("mkdir -p nowhere",), code=4
    ),
}


def _type(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_what_to_type(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code, the words that matter, what comes next, and nothing made on the way."""
    mistake = MISTAKES[name]
    mistake.prepare(tmp_path)
    before = sorted(os.listdir(tmp_path))

    code, output = _type(mistake.command, tmp_path, monkeypatch)
    assert (code, find_error_code(output)) == (mistake.code, mistake.error), output
    for words in (*mistake.words, mistake.next_step):
        assert words in output
    assert before == sorted(os.listdir(tmp_path))


def test_a_mark_of_excel_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a byte order mark is read; repeated lines are in the plan."""
    rows = [json.dumps({"question": f"{i} + 2?", "answer": i + 2}) for i in range(40)]
    text = "\n".join([*rows, rows[0]])
    (tmp_path / "excel.jsonl").write_text(text, encoding="utf-8-sig")

    code, output = _type("build --dry-run --tasks jsonl:excel.jsonl", tmp_path, monkeypatch)
    assert code == 0, output
    assert "1 lines that repeat another question" in output


def test_a_template_that_never_thinks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tags in the vocabulary alone do not make a model think."""
    _make_silent_model(tmp_path)
    code, output = _type("build model --dry-run", tmp_path, monkeypatch)
    assert code == 0, output
    assert "the chat template does not write <think>" in output


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_changed_bytes_are_not_run(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks a damaged bundle gets no answer of it."""
    (artifact,) = bundle.glob("tiny-*-Q8_0.gguf")
    data = bytearray(artifact.read_bytes())
    data[-1000] ^= 1
    artifact.write_bytes(data)

    code, output = _type("run bundle hello", tmp_path, monkeypatch)
    assert (code, find_error_code(output)) == (2, "differs-from-manifest"), output
    assert artifact.name in output


def test_a_file_that_is_cut_off_is_called_that(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With where the file ends, and where its tensor would."""
    (artifact,) = bundle.glob("tiny-*-Q8_0.gguf")
    artifact.write_bytes(artifact.read_bytes()[:1_000_000])

    code, output = _type(f"inspect {artifact}", tmp_path, monkeypatch)
    assert (code, find_error_code(output)) == (2, "damaged-gguf"), output
    assert "cut off" in output
    assert "at 1000000" in output


def test_lost_records_are_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, and no number of the system's."""
    (bundle / "records.jsonl").unlink()
    code, output = _type("verify bundle", tmp_path, monkeypatch)
    assert (code, find_error_code(output)) == (2, "report-file-unreadable"), output
    assert "bundle/records.jsonl" in output
    assert "Errno" not in output


def test_a_tier_larger_than_the_bundle_says_what_can_be_done(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ways, with the number that goes into the gate file."""
    code, output = _type("verify bundle --tier standard --plan", tmp_path, monkeypatch)
    assert (code, find_error_code(output)) == (2, "missing-dense-answers"), output
    for way in ("omit --tier", "tiers.standard.prompts = 60", "--baseline"):
        assert way in output


def test_the_folder_of_a_report_is_made(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--junit`` makes its folder, as ``--reports`` does."""
    (tmp_path / "gate.toml").write_text('checks = ["integrity"]\n[tiers.smoke]\nprompts = 2\n')
    command = "verify bundle --gate gate.toml --tier smoke --work work --junit ci/junit.xml"
    _type(command, tmp_path, monkeypatch)
    assert (tmp_path / "ci" / "junit.xml").read_text(encoding="utf-8").startswith("<?xml")

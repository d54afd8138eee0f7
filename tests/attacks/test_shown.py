"""Texts of a stranger are shown: they command no terminal, no workflow and no other program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.cli.console import print_result
from racdeploy.exporting.gguf.programs import companions
from racdeploy.files.unprintable import escape_unprintable, replace_unprintable
from racdeploy.manifest import Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.report.files import write_reports
from racdeploy.report.tuning_files import write_tuning
from tests.support.commands import environment
from tests.support.fake_bundle import make_fake_bundle
from tests.support.sample_report import build_records, build_report
from tests.support.sample_tuning import build_tuning
from tests.support.tiny_models import edit_json, make_checkpoint

ESCAPES = {
    "title": "\x1b]0;pwned\x07",
    "clipboard": "\x1b]52;c;cHduZWQ=\x07",
    "colour": "\x1b[31m",
    "clear": "\x9b2J",
    "right to left": "\u202egpj.exe",
    "carriage return": "safe\rpwned",
    "marks of direction": "a\u200eb\u200fc\u061cd",
    "nothing to see": "a\u200bb\u2060c\ufeffd",
    "tags": "a" + "".join(chr(0xE0000 + ord(each)) for each in "evil"),
}
COMMANDS = ("::error file=a::pwned", "::stop-commands::z", "::set-output name=a::b")
HIDDEN = ("\u200b", "\u200e", "\u200f", "\u061c", "\u2060", "\ufeff", "\U000e0065")
FORBIDDEN = ("\x1b", "\x9b", "\x07", "\u202e", "\r", *HIDDEN)


def _run(*command: str) -> str:
    done = CliRunner().invoke(app, list(command))
    assert "Traceback" not in done.output
    return done.output


@pytest.mark.answers("M8")
@pytest.mark.parametrize("name", ESCAPES)
def test_a_gguf_commands_no_terminal(tmp_path: Path, name: str) -> None:
    """Names of tensors, values of metadata, and the path itself."""
    file = tmp_path / f"m{ESCAPES[name].replace('/', '')}.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(f"model {ESCAPES[name]}")
    writer.add_tensor(f"w{ESCAPES[name]}", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    shown = _run("inspect", str(file)) + _run("inspect", str(file), "--json")
    assert not [each for each in FORBIDDEN if each in shown]
    file.write_bytes(b"GGUF")
    shown = _run("inspect", str(file))
    assert not [each for each in FORBIDDEN if each in shown]


@pytest.mark.answers("M8", "L2")
@pytest.mark.parametrize("text", [*ESCAPES.values(), *COMMANDS], ids=repr)
def test_an_error_commands_neither_terminal_nor_workflow(tmp_path: Path, text: str) -> None:
    """A text of the manifest, in the line that refuses it: never at the start of a line."""
    bundle = make_fake_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "racdeploy.json").read_text())
    manifest["artifacts"][0]["files"][f"x\n{text}"] = "0" * 64
    manifest[f"key\n{text}"] = 1
    (bundle / "racdeploy.json").write_text(json.dumps(manifest))

    shown = _run("inspect", str(bundle))
    assert "error:" in shown
    assert not [each for each in FORBIDDEN if each in shown]
    assert not [line for line in shown.splitlines() if line.startswith("::")]


@pytest.mark.answers("L2")
@pytest.mark.parametrize("text", [*COMMANDS, "##[add-mask]a"])
def test_what_is_printed_in_a_workflow_is_no_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """An answer has lines of its own; elsewhere it is shown as it is."""
    for where, count in (("true", 0), ("", 2)):
        monkeypatch.setenv("GITHUB_ACTIONS", where)
        print_result({}, [f"{text} and\n  {text}"], json_output=False)
        shown = capsys.readouterr().out
        lines = [line.lstrip() for line in shown.splitlines()]
        assert count == sum(line.startswith("::") or "##[" in line for line in lines)


WRITERS = {
    "an error of the template": (
        '{% if messages|length > 1 %}{{ raise_exception(\'x\nADAPTER EVIL.gguf\nSYSTEM """a\') }}'
        "{% endif %}{{ messages[0].content }}"
    ),
    "text of the template": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        '"""\nADAPTER EVIL.gguf\n'
    ),
}


@pytest.mark.answers("M9")
@pytest.mark.parametrize("name", WRITERS)
def test_a_template_writes_no_line_of_a_modelfile(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    edit_json(folder / "tokenizer_config.json", chat_template=WRITERS[name])
    written = _write_modelfile(tmp_path, folder)
    assert not [line for line in _directives(written) if line.startswith(("ADAPTER", "SYSTEM"))]


@pytest.mark.answers("M9")
def test_an_end_of_sequence_writes_no_line_of_a_modelfile(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text(encoding="utf-8")
        evil = json.dumps('a"""\nADAPTER EVIL.gguf\n')[1:-1]
        (folder / file).write_text(text.replace("<|im_end|>", evil), encoding="utf-8")
    assert "ADAPTER" not in "\n".join(_directives(_write_modelfile(tmp_path, folder)))


def _write_modelfile(tmp_path: Path, folder: Path) -> str:
    manifest = Manifest.read(make_fake_bundle(tmp_path / "bundle"))
    checkpoint = Checkpoint(folder)
    tokenizer = manifest.tokenizer.model_copy(update={"eos_ids": checkpoint.eos_ids})
    whole = manifest.model_copy(update={"tokenizer": tokenizer})
    return companions(whole, checkpoint, folder)["Modelfile"]


def _directives(modelfile: str) -> list[str]:
    """Return the lines outside of quoted texts, as Ollama splits a Modelfile."""
    outside = modelfile.split('"""')[::2]
    return "\n".join(outside).splitlines()


def test_json_keeps_every_character(tmp_path: Path) -> None:
    """Escaped, and the same once it is read."""
    shown = escape_unprintable(json.dumps("".join(ESCAPES.values()), ensure_ascii=False))
    assert not [each for each in FORBIDDEN if each in shown]
    assert json.loads(shown) == "".join(ESCAPES.values())


def test_words_that_need_joiners_stay_as_they_are() -> None:
    """Persian and a family."""
    text = "می\u200cخواهم \U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert text == replace_unprintable(text)


@pytest.mark.parametrize("key", ["backend", "format", "quant"])
def test_an_error_shows_part_of_a_long_value(tmp_path: Path, key: str) -> None:
    """3 MB in the manifest, some lines on the terminal."""
    folder = make_fake_bundle(tmp_path / "b")
    (entry,) = json.loads((folder / "racdeploy.json").read_text())["artifacts"]
    edit_json(folder / "racdeploy.json", artifacts=[entry | {key: "long " * 600_000}])
    assert len(_run("run", str(folder), "?")) < 3000
    assert len(_run("inspect", str(folder))) < 3000


def test_an_error_of_a_task_shows_part_of_it(tmp_path: Path) -> None:
    """A scorer of 1 MB, and a key of 500 kB."""
    file = tmp_path / "t.jsonl"
    for row in ({"question": "?", "answer": 1, "scorer": "s" * 10**6}, {"k" * 500_000: 1}):
        file.write_text(json.dumps(row))
        shown = _run("build", "--dry-run", "--tasks", f"jsonl:{file}")
        assert "error:" in shown
        assert len(shown) < 3000


@pytest.mark.parametrize("name", ["bundle", "search"])
def test_a_page_whose_author_put_a_script_into_it_is_not_opened(tmp_path: Path, name: str) -> None:
    """The page of what the report says is, from elsewhere; the bundle stays as it is."""
    write_reports(tmp_path, build_report(), build_records(), tmp_path.name)
    write_tuning(tmp_path, build_tuning())
    (tmp_path / "racdeploy.json").write_text("{}")
    asked = tmp_path if name == "bundle" else tmp_path / "tune.json"
    page = tmp_path / ("report.html" if name == "bundle" else "tune.html")
    report = ("report", str(asked), "--no-open", "--json")
    assert json.loads(_run(*report))["page"] == str(page)

    (tmp_path / "model.sig").write_text("{}")
    text = page.read_bytes()
    no_text = b"\xff" * len(text)
    for changed in (text + b"<script>pwn()</script>", text.replace(b"a", b"b"), no_text):
        page.write_bytes(changed)
        opened = Path(json.loads(_run(*report))["page"])
        assert (opened.read_bytes(), page.read_bytes()) == (text, changed)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_no_failure(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """The error of a wrong bundle comes out where it can, with its exit code."""

    def close() -> None:
        for stream in closed:
            os.close(stream)

    command = [sys.executable, "-m", "racdeploy", "run", str(tmp_path), "-"]
    done = subprocess.run(
        command, capture_output=True, env=environment(), preexec_fn=close, check=False, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "where it should not" not in done.stderr + done.stdout

"""``racdeploy compare``: files that racdeploy did not build, good ones and spoiled ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import constants

import racdeploy as library
from racdeploy.results.report import Report
from tests.support.commands import racdeploy
from tests.support.completion_server import serving
from tests.support.errors import raises
from tests.support.hub_server import Repository, hub_server, point_at
from tests.support.more import selected, some
from tests.support.real_server import llama_cpp_server, running
from tests.support.reasoner_files import SOURCE, reasoner_gguf, reasoner_onnx
from tests.support.spoiled_gguf import rewrite, spoil

ASKED: dict[str, Any] = {"prompts": 12, "max_new_tokens": 240, "threads": 1}
"""Enough to tell two files apart; the longest answer has 227 tokens."""
GATE = """
[accuracy]
margin = 0.3
[thinking]
unclosed = 0.3
loops = 0.3
forced = 0.3
truncated = 0.3
"""
"""For good models, which so few prompts do not show to be within the usual limits."""
FAILING = {
    "eos": {"tokens"},
    "rope": {"accuracy", "logits"},
    "zeroed": {"accuracy", "logits"},
    "endless": {"accuracy", "thinking", "logits"},
    "template": {"template"},
    "merge": {"tokens"},
    "tags": {"template"},
    "bos": {"template"},
}
"""Checks that each fault must fail; others may fail as well."""
EACH_CHECK = ("eos", "zeroed", "endless", "template", "bos")
"""Faults of which each check that a fault fails has one, and tokens one more."""


class EnoughError(Exception):
    """Ends a comparison of which nothing more is asked."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as F32 and Q8_0 GGUF, and its reference, recorded once."""
    folder = tmp_path_factory.mktemp("compared")
    for quant in ("f32", "q8_0"):
        shutil.copy(reasoner_gguf(quant), folder)
    library.record(folder / "f32.gguf", out=folder / "ref", work=folder / "work", **ASKED)
    (folder / "gate.toml").write_text(GATE)
    return folder


def compare_few(files: Path, *models: Path | str, **options: Any) -> tuple[library.Verdict, ...]:
    """Compare models with the reference, by limits for few prompts."""
    limits: dict[str, Any] = {"tier": "smoke", "gate": files / "gate.toml", "threads": 1}
    limits |= {"against": files / "ref", "work": files / "work"}
    return library.compare(list(models), **limits | options)


@pytest.fixture(scope="module")
def reports(files: Path, request: pytest.FixtureRequest) -> dict[str, Report]:
    """Reports of a good file, compared together with a spoiled one, and of each other fault."""
    faults = selected(request, "fault") or EACH_CHECK
    with_good, *others = [
        spoil(fault, files / "f32.gguf", files / f"{fault}.gguf") for fault in faults
    ]
    compared = [*compare_few(files, with_good, files / "q8_0.gguf")]
    for other in others:
        compared += compare_few(files, other, gate=None)
    return {Path(each.report.model).stem: each.report for each in compared}


def test_a_good_file_passes(reports: dict[str, Report]) -> None:
    """It comes first, though it was given last."""
    assert next(iter(reports)) == "q8_0"
    assert reports["q8_0"].verdict == "pass"
    decided = {"accuracy", "thinking", "logits", "template", "tokens", "integrity"}
    assert {check.name for check in reports["q8_0"].checks if check.verdict == "pass"} == decided


@pytest.mark.parametrize("fault", some(FAILING, EACH_CHECK))
def test_each_fault_fails_by_its_checks(fault: str, reports: dict[str, Report]) -> None:
    failed = {check.name for check in reports[fault].checks if check.verdict == "fail"}
    assert failed >= FAILING[fault]
    assert reports[fault].verdict == "fail"


def test_other_tokens_are_told_before_the_first_answer(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The answers of a large model take hours; equal tokens are no news."""
    caplog.set_level("INFO", "racdeploy")
    merge = spoil("merge", files / "f32.gguf", tmp_path / "merge.gguf")

    def stop(*_: object) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        library.compare(
            [files / "q8_0.gguf", merge],
            against=files / "ref",
            tier="smoke",
            work=files / "work",
            threads=1,
            progress=stop,
        )
    (line,) = caplog.messages
    assert line.startswith("merge.gguf has other tokens than f32.gguf: ")


def test_a_reference_needs_neither_its_model_nor_its_task(files: Path, tmp_path: Path) -> None:
    """Copied elsewhere it compares as before; other tasks are refused."""
    shutil.copytree(files / "ref", tmp_path / "ref")
    asked = (files / "q8_0.gguf", "--against", tmp_path / "ref", "--threads", 1)
    limits = ("--tier", "smoke", "--gate", files / "gate.toml", "--work", tmp_path)
    outcome = racdeploy("compare", *asked, *limits, "--json")
    (report,) = json.loads(outcome.out)
    assert (outcome.code, report["verdict"]) == (0, "pass")

    other = racdeploy("compare", *asked, *limits, "--tasks", "gcd")
    assert other.error_code == "reference-of-other-task"


@pytest.mark.more
def test_other_kinds_of_models(files: Path, tmp_path: Path) -> None:
    """An ONNX folder, a folder of transformers and a server answer as the GGUF file does."""
    onnx = reasoner_onnx()
    folder, file = (
        json.loads(racdeploy("inspect", path, "--json").out) for path in (onnx, onnx / "model.onnx")
    )
    assert folder == file
    assert folder["summary"]["size_bytes"] > 10_000_000

    with running(*llama_cpp_server(files / "q8_0.gguf")) as (url, _):
        models = compare_few(files, onnx) + compare_few(files, SOURCE, f"{url}#tiny")
    found = {model.report.target: model.report for model in models}
    assert {name: report.verdict for name, report in found.items()} == dict.fromkeys(
        ("onnxruntime", "transformers", "server"), "pass"
    )
    logits = {name: report.find_check("logits") for name, report in found.items()}
    assert logits["server"]
    assert logits["server"].verdict == "skipped"


@pytest.mark.more
def test_a_server_is_the_reference(files: Path, tmp_path: Path) -> None:
    """llama-cpp-python's server, and the same with the shapes that Ollama documents.

    Ollama splits off the thinking as ``reasoning``, and its model names have a tag.
    """
    asked = ASKED | {"tier": "smoke", "work": tmp_path}
    with running(*llama_cpp_server(files / "f32.gguf")) as (url, _):

        def answer(body: dict[str, Any]) -> dict[str, Any]:
            assert body["model"] == "tiny-reasoner:3m"
            sent = {name: value for name, value in body.items() if name != "Authorization"}
            request = Request(
                f"{url}/chat/completions",
                json.dumps(sent | {"model": "tiny"}).encode(),
                {"Content-Type": "application/json"},
            )
            with urlopen(request) as reply:
                answered = json.load(reply)
            (choice,) = answered["choices"]
            thinking, _, text = choice["message"]["content"].partition("</think>")
            choice["message"] = {"role": "assistant", "content": text, "reasoning": thinking}
            return {**answered, "model": body["model"], "system_fingerprint": "fp_ollama"}

        routes = {"v1/chat/completions": answer, "v1/models": list_models}
        with serving(routes) as ollama:
            found = [
                library.compare([files / "q8_0.gguf"], against=f"{address}#{name}", **asked)[0]
                for address, name in ((url, "tiny"), (ollama, "tiny-reasoner:3m"))
            ]

    for each in found:
        assert each.verdict == "pass", each.report.checks
        assert each.report.comparison
        assert each.report.comparison.length_ratio == pytest.approx(1, abs=0.02)


def list_models(_: dict[str, Any]) -> dict[str, Any]:
    """Return what Ollama answers to ``/v1/models``."""
    model = {"id": "tiny-reasoner:3m", "object": "model", "created": 0, "owned_by": "library"}
    return {"object": "list", "data": [model]}


def test_a_file_of_the_hub(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared, loaded and inspected by repository and quant; a wrong quant lists those."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server() as hub:
        point_at(hub.address, monkeypatch)
        hub.repositories["org/tiny-GGUF"] = Repository()
        content = (files / "q8_0.gguf").read_bytes()
        hub.repositories["org/tiny-GGUF"].commit({"tiny-Q8_0.gguf": content})

        (found,) = compare_few(files, "org/tiny-GGUF:q8_0")
        assert (found.verdict, found.report.model) == ("pass", "tiny-Q8_0.gguf")
        with library.load("org/tiny-GGUF:Q8_0", threads=1) as model:
            assert model.generate("What is 12 times 34?", max_new_tokens=400).state == "closed"

        inspected = racdeploy("inspect", "org/tiny-GGUF:q8_0", "--summary", "--json")
        assert json.loads(inspected.out)["summary"]["size_bytes"] == len(content)
        for verb in (["run"], ["bench"], ["compare", "--against", files / "ref"]):
            outcome = racdeploy(*verb, "org/tiny-GGUF:q2_k", *["Hi"] * (verb == ["run"]))
            assert (outcome.code, outcome.error_code) == (2, "no-such-quant")
            assert "Q8_0" in outcome.err


def test_a_card_and_a_plan(files: Path, tmp_path: Path) -> None:
    asked = (files / "q8_0.gguf", "--against", files / "ref", "--threads", 1, "--work", tmp_path)
    card = racdeploy("compare", *asked, "--card", "--exit-zero")
    assert "| q8_0.gguf |" in card.out
    assert "12 questions" in card.out

    plan = racdeploy("compare", *asked, "--plan", "--json")
    assert json.loads(plan.out)["candidates"] == ["q8_0.gguf"]

    (tmp_path / "d2").mkdir()
    other = shutil.copy(files / "q8_0.gguf", tmp_path / "d2")
    plan = racdeploy("compare", other, *asked, "--plan", "--json")
    folders = ("d2", files.name)
    assert json.loads(plan.out)["candidates"] == [f"{name}/q8_0.gguf" for name in folders]


def test_a_plain_file_runs_as_a_bundle_does(files: Path) -> None:
    """Loaded, measured and served without a bundle; its answers are those of the bundle's file."""
    with library.load(files / "q8_0.gguf", threads=1) as model:
        found = model.generate("What is 12 times 34?", max_new_tokens=400)
    assert ("408" in found.answer, found.state) == (True, "closed")

    with library.load(reasoner_onnx(), threads=1) as model:
        assert model.generate("What is 12 times 34?", max_new_tokens=400) == found

    sizes = ("--prompt-tokens", 16, "--new-tokens", 8, "--rounds", 1, "--threads", 1)
    f32, q8_0 = files / "f32.gguf", files / "q8_0.gguf"
    outcome = racdeploy("bench", q8_0, "--dense", f32, *sizes)
    assert outcome.code == 0, outcome.err
    assert "reference" in outcome.out
    assert "pruned" not in outcome.out + outcome.err
    assert racdeploy("bench", q8_0, *sizes).error_code == "no-dense-artifact"


@pytest.mark.usefixtures("reports")  # writes the file
def test_no_report_calls_a_plain_file_pruned(files: Path, tmp_path: Path) -> None:
    """Neither the terminal nor a file; the JSON keeps the names of both arms."""
    files_asked = (
        files / "endless.gguf",
        "--against",
        files / "ref",
        "--junit",
        tmp_path / "j.xml",
    )
    outcome = racdeploy(
        *("compare", *files_asked, "--reports", tmp_path / "r", "--work", tmp_path, "--threads", 1)
    )
    assert outcome.code == 1
    folder = tmp_path / "r" / "endless.gguf"
    texts = [outcome.out, (tmp_path / "j.xml").read_text(), (folder / "report.md").read_text()]
    page = (folder / "report.html").read_text()
    texts.append(re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL))
    for text in texts:
        assert not re.search(r"\b(dense|pruned|pruning|sparsity is|bundle)\b", text), text


def test_bad_models(files: Path, tmp_path: Path) -> None:
    """Refused before the first answer."""
    f32 = files / "f32.gguf"
    asked: dict[str, Any] = {"against": f32, "work": tmp_path}
    with raises("no-such-folder"):
        library.compare([tmp_path / "no.gguf"], **asked)
    with raises("no-template-in-file"):
        bare = rewrite(f32, tmp_path / "bare.gguf", lambda k, v: "" if "template" in k else v)
        library.compare([bare], **asked)
    with raises("only-servers"):
        library.compare(["http://127.0.0.1:1/v1"], against="http://127.0.0.1:2/v1")
    with raises("questions-beyond-context"):
        library.compare([f32], **asked, context_tokens=4096)

    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "reference.json").write_text("{}")
    with raises("damaged-report"):
        library.compare([f32], against=tmp_path / "ref")

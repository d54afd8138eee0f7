"""A bundle in the hands of other programs: each gives the tokens that racdeploy's engine gives.

onnxruntime-genai, optimum, transformers.js under Node, and transformers.js and wllama in a real
browser.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import racdeploy
from racdeploy.engines.engine import Sampling
from racdeploy.exporting import onnx as onnx_format
from racdeploy.manifest import Manifest
from racdeploy.models.checkpoint import Checkpoint
from tests.support.commands import racdeploy as command
from tests.support.cut_models import cut_checkpoint
from tests.support.onnx_clients import GENAI, run, write_onnx_bundle
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_onnx import needs_optimum

pytestmark = pytest.mark.slow
QUESTION = "What is 12 times 34?"
NEW_TOKENS = 160
EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
PACKAGES = ("@huggingface/transformers@4", "@wllama/wllama@3", "playwright-core@1")
CUTS = {"uniform": ((2, 64), (2, 64)), "per block": ((4, 96), (2, 64))}
CUT_TOKENS = 12
OPTIMUM = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder)
ids = torch.tensor([ids])
mask = torch.ones_like(ids)
found = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
print(json.dumps(found[0].tolist()))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at 50 %, for browsers and as GGUF.

    Few prompts, since answers are compared one by one here.
    """
    root = tmp_path_factory.mktemp("clients")
    outcome = command(
        *(
            "build",
            "tiny-reasoner",
            "--target",
            "browser",
            "--more-targets",
            "gguf",
            "--prompts",
            8,
            "--trace-prompts",
            64,
        ),
        *("--work", root / "work", "--out", root / "bundle", "--threads", 1),
    )
    assert outcome.code in (0, 3), outcome.err  # 3: eight prompts decide nothing
    return root / "bundle"


@pytest.fixture(scope="module", params=CUTS)
def cut_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with two of three blocks left, whose head size follows from nothing else."""
    folder = tmp_path_factory.mktemp("cut")
    dense = make_checkpoint(folder / "dense", "qwen2", num_hidden_layers=3)
    checkpoint = cut_checkpoint(dense, folder / "checkpoint", CUTS[request.param], blocks=(0, 2))
    onnx_format.export(Checkpoint(checkpoint), folder / "model.onnx", quant="f32")
    return write_onnx_bundle(checkpoint, folder / "model.onnx")


@pytest.fixture(scope="module")
def prompt_and_ids(bundle: Path) -> tuple[list[int], list[int]]:
    """Prompt ids, and prompt and completion together as racdeploy's engine continues it."""
    with racdeploy.load(bundle, backend="onnxruntime", threads=1) as model:
        prompt = list(model.encoder.encode(QUESTION))
        stops = model.settings.tokenizer.eos_ids
        (completion,) = model.engine.generate([prompt], Sampling(NEW_TOKENS, stops))
    assert completion.finish_reason == "stop"
    return prompt, [*prompt, *completion.ids]


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages, and the scripts of this folder beside them."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("needs Node 20 or newer with npm: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("npm")
    done = subprocess.run(
        [
            "npm",
            "install",
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--prefix",
            folder,
            *PACKAGES,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"npm could not install {', '.join(PACKAGES)}: {done.stderr}"
    for script in Path(__file__).parent.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


@pytest.fixture(scope="module")
def address(bundle: Path, npm: Path) -> Iterator[str]:
    """The page, served as a user would."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        import serve  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLE))
    server = serve.serve(bundle, npm / "node_modules", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_onnxruntime_genai_generates_the_same_tokens(
    bundle: Path, prompt_and_ids: tuple[list[int], list[int]]
) -> None:
    """It stops at the end-of-sequence id too, and leaves it out of the sequence."""
    prompt, expected = prompt_and_ids
    assert run(sys.executable, "-c", GENAI, bundle, json.dumps(prompt), NEW_TOKENS) == expected[:-1]


@needs_optimum
def test_optimum_generates_the_same_tokens(
    bundle: Path, prompt_and_ids: tuple[list[int], list[int]]
) -> None:
    prompt, expected = prompt_and_ids
    assert run(sys.executable, "-c", OPTIMUM, bundle, json.dumps(prompt), NEW_TOKENS) == expected


def test_transformers_js_generates_the_same_tokens_in_node(
    bundle: Path, npm: Path, prompt_and_ids: tuple[list[int], list[int]]
) -> None:
    """Its own tokenizer and template too: prompt ids are part of what it prints."""
    folder = f"{bundle.parent}/"
    assert (
        run("node", "node.mjs", folder, bundle.name, QUESTION, NEW_TOKENS, cwd=npm)
        == prompt_and_ids[1]
    )


def test_a_cut_model_generates_the_same_tokens_unasked(cut_bundle: Path, npm: Path) -> None:
    """In onnxruntime-genai and in transformers.js, whatever the widths of its blocks."""
    with racdeploy.load(cut_bundle, backend="onnxruntime", threads=1) as model:
        prompt = list(model.encoder.encode(QUESTION))
        (completion,) = model.engine.generate([prompt], Sampling(CUT_TOKENS, stop_ids=()))
    expected = [*prompt, *completion.ids]
    count = str(CUT_TOKENS)
    assert run(sys.executable, "-c", GENAI, cut_bundle, json.dumps(prompt), count) == expected
    folder = f"{cut_bundle.parent}/"
    assert run("node", "node.mjs", folder, cut_bundle.name, QUESTION, count, cwd=npm) == expected


@pytest.mark.parametrize("engine", ["onnx", "gguf"])
def test_the_page_thinks_and_answers_in_chromium(
    bundle: Path, npm: Path, address: str, tmp_path: Path, engine: str
) -> None:
    """Thinking and answer apart as they stream, as racdeploy tells them apart.

    Nothing is asked from elsewhere.
    """
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip("needs Chromium in PATH: apt-get install chromium")
    backend = {entry.format: entry.backend for entry in Manifest.read(bundle).artifacts}[engine]
    with racdeploy.load(bundle, backend=backend, threads=1) as model:
        expected = model.generate(QUESTION, temperature=0)
    shown = run(
        "node", "browser.mjs", address, chromium, tmp_path / "profile", engine, QUESTION, cwd=npm
    )
    assert (shown["errors"], shown["outside"], shown["isolated"]) == ([], [], True)
    assert shown["status"].startswith("Done"), shown["status"]
    assert (shown["thinking"], shown["answer"]) == (expected.thinking, expected.answer)
    assert "50 % zeros" in shown["model"]
    assert shown["painted"] > 5, "the page was not painted while the model was thinking"
    assert 0 < shown["stopped"] < expected.thinking_tokens, "Stop does not stop"

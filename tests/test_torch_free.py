"""The base package and the runtime import no deep-learning framework and no engine."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import racdeploy
from racdeploy import sparse_kernels
from racdeploy.cli import options
from racdeploy.verification import examiner
from tests.support.tiny_artifacts import make_onnx_bundle

HEAVY = (
    "torch",
    "transformers",
    "optimum",
    "llama_cpp",
    "onnxruntime",
    "onnx",
    "gguf",
    "scipy",
    "httpx",
    "huggingface_hub",
    "starlette",
    "uvicorn",
)


def modules_after(statement: str) -> set[str]:
    """Return the names of all modules that a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import racdeploy.runtime",
        "import racdeploy; racdeploy.load",
        "import racdeploy.engines.backends.llamacpp",
        "import racdeploy.engines.backends.onnxruntime",
        "import racdeploy.engines.backends.server",
    ],
)
def test_running_a_bundle_imports_nothing_heavy(statement: str) -> None:
    assert modules_after(statement).isdisjoint({*HEAVY, "tokenizers", "jinja2"})


def test_importing_racdeploy_imports_next_to_nothing() -> None:
    """Not even numpy: what is needed comes on first use."""
    loaded = modules_after("import racdeploy; racdeploy.errors.UsageError; racdeploy.__version__")
    assert loaded.isdisjoint({*HEAVY, "numpy", "pydantic", "tokenizers", "jinja2", "typer"})


def test_a_verb_imports_what_it_needs_when_it_is_called() -> None:
    """--help, --version and a wrong option answer without arrays, tokenizers or templates."""
    loaded = modules_after(
        "from racdeploy.cli.app import app; app(['--version'], standalone_mode=False)"
    )
    assert loaded.isdisjoint({*HEAVY, "numpy", "tokenizers", "jinja2"})


def test_the_command_line_offers_what_there_is() -> None:
    """Two options list their choices without importing those who take them."""
    questions = inspect.signature(racdeploy.verify).parameters["server_api"].annotation
    assert options.Kernels == sparse_kernels.AccelMode
    assert re.findall(r"'(\w+)'", questions) == [*get_args(examiner.ServerApi)]


def test_kernels_in_front_of_another_program_bring_little() -> None:
    """What a process keeps beside its own llama_cpp: pydantic alone would be 12 MB."""
    loaded = modules_after("from racdeploy import sparse_kernels as k; k.list_kernels()")
    assert loaded.isdisjoint({*HEAVY, "pydantic", "tokenizers", "jinja2", "typer"})


def test_a_search_for_gguf_needs_no_package_of_onnx() -> None:
    """Its sizes, and the profile of a device."""
    loaded = modules_after("import racdeploy.tuning.winner")
    assert loaded.isdisjoint({"onnx", "onnxruntime"})


def test_everything_that_is_public_is_there() -> None:
    assert all(getattr(racdeploy, name) is not None for name in racdeploy.__all__)
    assert set(racdeploy.__all__) <= set(dir(racdeploy))


def test_the_functions_are_there_without_torch() -> None:
    """Also after the package of the same name was imported; a signature needs nothing more."""
    loaded = modules_after(
        "import inspect, racdeploy, racdeploy.exporting.gguf\n"
        "assert callable(racdeploy.build) and callable(racdeploy.export)\n"
        "assert 'recipe' in inspect.signature(racdeploy.prune).parameters\n"
        "from racdeploy import exporting; exporting.load"
    )
    assert loaded.isdisjoint({"torch", "transformers", "optimum"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        racdeploy.nonsense  # noqa: B018


def without(folder: Path, *modules: str) -> str:
    """Return a PYTHONPATH under which those modules are not installed."""
    (folder / "sitecustomize.py").write_text(
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {modules}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    return os.pathsep.join([str(folder), *sys.path])


def test_an_onnx_bundle_runs_on_onnxruntime_alone(tmp_path: Path) -> None:
    """Neither the app nor the engine's process needs anything beyond onnxruntime, numpy, tokenizers
    and jinja2.
    """
    bundle = make_onnx_bundle(tmp_path)
    code = (
        f"import racdeploy\nwith racdeploy.load({str(bundle)!r}) as model:\n"
        "    print(model.generate('2 + 2?'))"
    )
    path = without(
        tmp_path, *sorted({*HEAVY, "safetensors", "onnxruntime_genai"} - {"onnxruntime"})
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "thinking_tokens=8" in done.stdout


def test_a_base_install_names_the_missing_extra(tmp_path: Path) -> None:
    """Without torch, build is one sentence with the pip line and exit code 4; listing plugins still
    works.
    """
    path = without(tmp_path, "torch")
    code = "import racdeploy.cli; racdeploy.cli.main()"
    for arguments, expected in ((["plugins"], 0), (["build", "--out", str(tmp_path / "out")], 4)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert done.returncode == expected, done.stderr
        assert "Traceback" not in done.stderr
    assert 'pip install "racdeploy[prune]"' in done.stderr

"""Addresses of stages: an edit of what a stage runs changes its address, and no other edit does."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import racdeploy
from racdeploy import plugins
from racdeploy.files import code_hashes
from racdeploy.files.code_hashes import base_version, code_hash, reachable_files
from racdeploy.pipeline import workspace

ROOT = Path(racdeploy.__file__).parent
STAGES = {
    "traces": "racdeploy.pipeline.trace_stage",
    "prune": "racdeploy.pipeline.prune_stage",
    "export": "racdeploy.pipeline.export_stage",
    "answers": "racdeploy.verification.answer_cache",
}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder of a copy of the package, its code alone, of which addresses are then."""
    only_code = shutil.ignore_patterns("__pycache__", "tiny_reasoner", "sources")
    copied = shutil.copytree(ROOT, tmp_path / "racdeploy", ignore=only_code)
    with monkeypatch.context() as patch:
        patch.setattr(code_hashes, "ROOT", copied)
        yield copied
    code_hash.cache_clear()


def _reached(stage: str) -> set[str]:
    return {file.relative_to(ROOT).as_posix() for file in reachable_files([STAGES[stage]])}


def _hash_again(module: str) -> str:
    """Return the hash that a new process would find."""
    code_hash.cache_clear()
    return code_hash(module)


def _edit(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n# edited\n")


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.more)])
@pytest.mark.parametrize("stage", STAGES)
def test_every_file_that_a_stage_reaches_is_in_its_address(
    copy: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    """Each edit gives another address, and the whole copy the address of the original."""
    module = STAGES[stage]
    reached = reachable_files([module])[::step]
    found = [_hash_again(module)]
    with monkeypatch.context() as patch:
        patch.setattr(code_hashes, "ROOT", ROOT)
        assert found == [_hash_again(module)]

    for file in reached:
        _edit(file)
        found.append(_hash_again(module))
    assert len(set(found)) == len(reached) + 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_that_a_stage_does_not_reach_is_not_in_its_address(copy: Path, stage: str) -> None:
    """A report, a check, the order of the stages, the command line: none makes traces again."""
    before = _hash_again(STAGES[stage])
    reached = set(reachable_files([STAGES[stage]]))
    for file in copy.rglob("*.py"):
        if file not in reached:
            _edit(file)
    assert _hash_again(STAGES[stage]) == before


def test_an_edit_during_a_run_is_of_the_next_run(copy: Path) -> None:
    """A process goes on with the code that it has imported, and so with its address."""
    before = _hash_again(STAGES["traces"])
    _edit(copy / "tasks/scorers/boxed.py")
    assert code_hash(STAGES["traces"]) == before
    assert _hash_again(STAGES["traces"]) != before


def test_a_stage_reaches_what_decides_its_content() -> None:
    """Scorers judge traces, packings a file; the rest are plugins, and data they read."""
    assert {
        "tasks/scorers/boxed.py",
        "sandbox/scoring_operations.py",
        "tasks/sets/gcd.py",
    } <= _reached("traces")
    assert {
        "engines/backends/transformers/torch_model.py",
        "engines/backends/server/chat.py",
    } & _reached("traces")
    assert {
        "pruning/methods/admm.py",
        "pruning/allocations/error.py",
        "traces/select.py",
    } <= _reached("prune")
    assert {"packing/onnx/folding.py", "packing/packers/bitmask.py"} <= _reached("export")
    assert {"recipe/recipe.toml", "tensors/ggml_types.toml"} <= _reached("export")
    assert {"exporting/gguf/__init__.py", "quant/formats/q4_k.py"} <= _reached("export")
    assert "exporting/onnx/exporters/optimum/child.py" in _reached("export")
    assert "exporting/onnx/parity.py" in _reached("export")


def test_answers_depend_on_no_pruning_and_no_harness() -> None:
    """Stored answers outlive a change of a method, a harness or an exporter."""
    apart = (
        "pruning/m",
        "pruning/w",
        "pruning/s",
        "recovery/",
        "harnesses/",
        "exporting/",
        "verification/checks/",
    )
    assert not [name for name in _reached("answers") if name.startswith(apart)]


def test_no_stage_reaches_what_comes_after_it() -> None:
    """Reports, checks, the job and the order may change without a stage being run again."""
    assert "engines/backends/llamacpp/native.py" in _reached("answers")
    later = ("pipeline/build.py", "pipeline/job.py", "pipeline/preflight.py", "report/html.py")
    later += ("report/tables.py", "verification/checks/", "bundles/", "cli/")
    for stage in STAGES:
        assert not [name for name in _reached(stage) if name.startswith(later)], stage
    assert not [name for name in _reached("traces") if name.startswith(("report/", "exporting/"))]
    assert not [
        name
        for name in _reached("traces")
        if name.startswith(("engines/backends/llamacpp", "pruning/m"))
    ]
    assert not [name for name in _reached("prune") if name.startswith(("exporting/", "packing/"))]


@pytest.mark.more
def test_a_scorer_that_is_edited_gives_another_trace_folder(copy: Path) -> None:
    """On the product's path: a copy runs, and says where its traces of the embedded model are."""
    shutil.copytree(ROOT / "models/tiny_reasoner", copy / "models/tiny_reasoner")
    shutil.copytree(ROOT.parent / "targets", copy / "targets")
    code = (
        "import json; from pathlib import Path\n"
        "from racdeploy.pipeline.build import Build\n"
        "from racdeploy.pipeline.job import Job\n"
        "from racdeploy.recipe import Recipe\n"
        "from racdeploy.files.stages import Stage\n"
        "job = Job(Recipe.combine(None, {}))\n"
        "inputs = Build(job, Path()).trace_stage.inputs(job.checkpoint)\n"
        "stage = Stage.locate(Path(), 'traces', inputs)\n"
        "print(json.dumps([stage.folder.name, str(job.model.folder)]))"
    )

    def find_traces() -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(copy.parent)}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            cwd=copy.parent,
            check=True,
        )
        found: list[str] = json.loads(done.stdout)
        return found

    before, model = find_traces()
    assert Path(model).is_relative_to(copy)

    _edit(copy / "report/html.py")
    assert find_traces()[0] == before

    _edit(copy / "tasks/scorers/boxed.py")
    assert find_traces()[0] != before


def test_every_plugin_is_loaded_by_a_kind_that_is_written_out() -> None:
    """A kind in a variable could be any, and the address would cover every plugin there is."""
    wrong = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "plugins.load":
                kind = node.args[0]
                if not (isinstance(kind, ast.Constant) and kind.value in plugins.KINDS):
                    wrong.append(f"{file.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not wrong


def test_every_child_process_is_reached_by_who_starts_it() -> None:
    """A module with a ``main`` of its own is named in full by another one, which so reaches it."""
    for file in sorted(ROOT.rglob("*.py")):
        source = file.read_bytes()
        starts_itself = b"run_module(__name__" in source or b'"-I", __file__' in source
        if (
            file.name == "__main__.py"
            or starts_itself
            or b'if __name__ == "__main__":' not in source
        ):
            continue
        name = ".".join(("racdeploy", *file.relative_to(ROOT).with_suffix("").parts))
        starters = [
            each for each in ROOT.rglob("*.py") if f'"{name}"'.encode() in each.read_bytes()
        ]
        assert starters, f"nobody starts {name}"
        for each in starters:
            starter = ".".join(("racdeploy", *each.relative_to(ROOT).with_suffix("").parts))
            assert file in reachable_files([starter.removesuffix(".__init__")])


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.1.0", "0.1.0"),
        ("0.1.dev458", "0.1.0"),
        ("0.1.dev459", "0.1.0"),
        ("1.2.4.dev1+g31333af.d20261126", "1.2.4"),
        ("1.2.3rc1", "1.2.3"),
        ("1.2.3.4", "1.2.3.4"),
        ("0+unknown", "0.0.0"),
        ("unknown", "0.0.0"),
    ],
)
def test_commits_between_releases_are_one_release(version: str, release: str) -> None:
    """A version of every commit would put an end to every unfinished stage."""
    assert base_version(version) == release


def test_another_commit_keeps_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release does not."""
    found = []
    for version in ("0.1.dev458", "0.1.dev459", "0.1.0", "0.1.1.dev1"):
        monkeypatch.setattr(workspace, "__version__", version)
        found.append(workspace.identify_code("racdeploy.pipeline.trace_stage")["version"])
    assert found == ["0.1.0", "0.1.0", "0.1.0", "0.1.1"]

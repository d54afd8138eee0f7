"""bench: both artifacts in every round, in turn; the dense one found where the build left it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from racdeploy.bundles import bench as benchmark
from racdeploy.bundles.bench import FIGURES, BenchSettings, bench, find_dense_artifact
from racdeploy.cli.app import app
from racdeploy.engines.engine import Completion, Engine, EngineSettings, Sampling
from racdeploy.exporting import ExportResult, count_weight_bytes
from racdeploy.files.stages import Stage
from racdeploy.manifest import BaseEntry, Manifest
from tests.support.errors import raises
from tests.support.sample_report import arm, build_report
from tests.support.tiny_artifacts import CONTEXT_TOKENS, make_bundle


class CountingEngine(Engine):
    """Takes 10 ms a prompt token and 20 ms a new one, the pruned artifact half of that; grows
    slower with each load.
    """

    opened: list[Path]

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        self.info: dict[str, Any] = {}
        self._parallel = settings.parallel
        self.opened.append(path)
        self._slow = (1.0 if "dense" in path.name else 0.5) * (1 + len(self.opened) / 100)
        self.stats = {
            "load_ms": 8 * self._slow,
            "peak_rss_bytes": 2e6,
            "prompt_tokens": 0.0,
            "generated_tokens": 0.0,
        }
        self.stats |= {"prefill_s": 0.0, "decode_s": 0.0}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        assert not sampling.stop_ids, "an end-of-sequence would shorten a round"
        new_tokens, warming = sampling.max_new_tokens, sampling.max_new_tokens == 2
        assert len(prompts) == (1 if warming else self._parallel)
        for ids in prompts:
            self.stats["prompt_tokens"] += len(ids)
            self.stats["generated_tokens"] += new_tokens
            self.stats["prefill_s"] += 0.01 * len(ids) * self._slow
        self.stats["decode_s"] += 0.02 * (new_tokens - 1) * self._slow
        return []

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    file = tmp_path / "dense.gguf"
    file.touch()
    return file


def _engine(monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Any]) -> None:
    monkeypatch.setattr(benchmark, "open_engine", lambda _, path, settings: engine(path, settings))


def test_the_artifacts_take_turns_and_the_first_round_does_not_count(
    bundle: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which comes first changes, so that a machine that grows slower harms both alike."""
    CountingEngine.opened = []
    _engine(monkeypatch, CountingEngine)
    found = bench(bundle, dense, BenchSettings(rounds=3, prompt_tokens=100, new_tokens=50))
    names = ["dense" if path == dense else "pruned" for path in CountingEngine.opened]
    assert names == ["dense", "pruned", "pruned", "dense", "dense", "pruned", "pruned", "dense"]
    assert len(found.dense_rounds) == len(found.pruned_rounds) == 3
    # A load is 1 % slower than the one before it, so neighbours differ by less than 1 %.
    for name, expected in {
        "load_ms": 0.5,
        "prefill_tokens_per_s": 2,
        "decode_tokens_per_s": 2,
    }.items():
        assert found.ratios()[name] == pytest.approx([expected] * 3, rel=0.01)
    assert found.medians()[0]["decode_tokens_per_s"] == pytest.approx(50, rel=0.1)
    assert set(found.to_json()["ratio"]) == set(FIGURES)


def test_sequences_together_count_together(
    bundle: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once, in the time of one each: four times the tokens a second."""
    CountingEngine.opened = []
    _engine(monkeypatch, CountingEngine)
    found = bench(
        bundle, dense, BenchSettings(rounds=1, prompt_tokens=100, new_tokens=50, parallel=4)
    )
    assert found.medians()[0]["decode_tokens_per_s"] == pytest.approx(4 * 50, rel=0.1)
    assert found.to_json()["parallel"] == 4


@pytest.mark.parametrize(("slowest", "is_noisy"), [(9.0, False), (6.0, True)])
def test_rounds_that_scatter_are_called_too_noisy(slowest: float, is_noisy: bool) -> None:
    """Rather than a ratio that the next run will not show."""
    dense = dict.fromkeys(FIGURES, 10.0)
    rounds = tuple(dense | {"decode_tokens_per_s": speed} for speed in (10.0, slowest, 10.0))
    found = benchmark.BenchResult(BenchSettings(), Path("d"), Path("p"), (dense,) * 3, rounds)
    assert ("raise --rounds" in found.warning) == is_noisy
    assert found.to_json()["warning"] == found.warning


@pytest.mark.parametrize(("dense_bytes", "pruned_bytes"), [(3000, 2000), (2000, 2000), (3000, 0)])
def test_the_files_stand_beside_the_speed(dense_bytes: int, pruned_bytes: int) -> None:
    """Nothing of them where another file is read."""
    figures = dict.fromkeys(FIGURES, 10.0)
    sides = (Path("dense"), Path("pruned"), (figures,), (figures,))
    found = benchmark.BenchResult(BenchSettings(rounds=1), *sides, "", dense_bytes, pruned_bytes)
    files = [row for row in found.to_table().rows if row[0] == "files"]
    assert bool(files) == bool(pruned_bytes)


def test_all_files_of_an_artifact_are_counted(tmp_path: Path) -> None:
    """Numbered parts, and the weights beside a graph; another model's files are not."""
    for number, size in ((1, 100), (2, 50)):
        (tmp_path / f"m-{number:05d}-of-00002.gguf").write_bytes(b"x" * size)
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"x" * 7)
    for name, size in (("model.onnx", 10), ("model.onnx_data", 90), ("other.onnx_data", 3)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert count_weight_bytes(tmp_path / "m-00001-of-00002.gguf") == 150
    assert count_weight_bytes(tmp_path / "model.onnx") == 100


def test_an_engine_that_counts_nothing_is_refused(
    bundle: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure is measured or absent, never zero."""

    class Silent(CountingEngine):
        def __init__(self, path: Path, settings: EngineSettings) -> None:
            super().__init__(path, settings)
            self.stats = {}

        def generate(
            self, prompts: Sequence[Sequence[int]], sampling: Sampling
        ) -> list[Completion]:
            return []

    Silent.opened = []
    _engine(monkeypatch, Silent)
    with raises("no-engine-stats"):
        bench(bundle, dense, BenchSettings(rounds=1, prompt_tokens=32, new_tokens=8))


def test_what_cannot_be_measured_is_said_before_anything_is_loaded(
    bundle: Path, dense: Path
) -> None:
    """A context that is too short, a dense artifact that is not there."""
    with raises("load-beyond-context", str(CONTEXT_TOKENS)):
        bench(bundle, dense, BenchSettings(prompt_tokens=200, new_tokens=100))
    with raises("no-dense-artifact", "missing.gguf"):
        bench(bundle, dense.with_name("missing.gguf"), BenchSettings())


def test_the_dense_artifact_is_found_by_its_hash(bundle: Path, tmp_path: Path) -> None:
    """The stage whose files the report names; not the pruned one, another model's, or one that
    never ended.
    """
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = Manifest.read(bundle).model_copy(update={"base": BaseEntry(name="tiny")})
    (copy / "racdeploy.json").write_text(manifest.model_dump_json())
    dense = arm("dense", 200, quant="q8_0", files={"right.gguf": "a" * 64})
    report = build_report().model_copy(update={"arms": (dense,)})
    (copy / "report.json").write_text(report.model_dump_json())

    work = tmp_path / "work"
    with raises("no-dense-artifact", str(work), "q8_0", "tiny", "--dense"):
        find_dense_artifact(copy, work)

    for name, sha256, ends in (
        ("right.gguf", "a" * 64, True),
        ("pruned.gguf", "a" * 64, True),
        ("other.gguf", "b" * 64, True),
        ("half.gguf", "a" * 64, False),
    ):
        stage = Stage.open(work, "export", {"name": name})
        if ends:
            file = stage.folder / name
            file.write_bytes(b"x")
            stage.finish(ExportResult(file, (), 1, {name: sha256}).to_json(stage.folder))
    assert find_dense_artifact(copy, work).name == "right.gguf"


def test_the_command_measures_a_real_model_against_itself(bundle: Path) -> None:
    """llama.cpp, twice the same file: every figure is there, and the memory is about the same."""
    arguments = ["bench", bundle, "--dense", bundle / "model.gguf", "--rounds", 1, "--threads", 1]
    load = ["--prompt-tokens", 64, "--new-tokens", 16]
    done = CliRunner().invoke(app, [*map(str, [*arguments, *load]), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert all(found[side][name] > 0 for side in ("dense", "pruned") for name in FIGURES)
    assert 0.5 < found["ratio"]["peak_rss_bytes"] < 2
    table = CliRunner().invoke(app, [*map(str, [*arguments, *load])])
    assert "tokens/s decoded" in table.stdout

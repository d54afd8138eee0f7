"""The example that reproduces tables: its plan, its commands, its table, and the models' sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.sample_report import build_report
from tests.support.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "examples" / "reproduce" / "reproduce.py"
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "r1-qwen-1.5b": 1_777_088_000,
}
"""As published with the models; an embedding that is also the output counts once."""


@pytest.fixture
def example() -> ModuleType:
    return load_script(SCRIPT, "reproduce")


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    example.main()


def test_shapes_are_those_of_the_models(example: ModuleType, tmp_path: Path) -> None:
    """The file of zeros has two bytes for each published parameter, beside its header."""
    assert example.SHAPES.keys() == PARAMETERS.keys()
    for name, config in example.SHAPES.items():
        example.write_shapes(tmp_path, config)
        size_bytes = (tmp_path / "model.safetensors").stat().st_size
        assert 0 < size_bytes - 2 * PARAMETERS[name] < 100_000


def test_a_dry_run_plans_every_step(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 4}
    shape = example.SHAPES["qwen3-0.6b"] | small | {"vocab_size": 8192}
    monkeypatch.setitem(example.SHAPES, "qwen3-0.6b", shape)
    options = ("--dry-run", "--cells", "2:4 RAC", "--out", str(tmp_path / "out"))
    run(example, monkeypatch, "qwen3-0.6b", *options)

    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| step | hours, 2 cores | hours, 8 cores |")
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| traces, once", "| 2:4 RAC"]
    assert not (tmp_path / "out").exists()

    with pytest.raises(SystemExit, match="^2$"):
        run(example, monkeypatch, "qwen3-0.6b", *options, "--model", str(tmp_path / "missing"))
    assert "there is no folder" in capsys.readouterr().err


def test_cells_are_built_once_and_tabled(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A failed verification is a row too; a build that breaks off ends the run with its code."""
    commands = []

    def build(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        bundle = Path(command[command.index("--out") + 1])
        bundle.mkdir(parents=True)
        (bundle / "report.json").write_text(build_report().model_dump_json(), encoding="utf-8")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(example.subprocess, "run", build)
    arguments = ("r1-qwen-1.5b", "--out", str(tmp_path), "--launcher", "torchrun -m", "--cells")
    run(example, monkeypatch, *arguments, "50 % RAC")
    run(example, monkeypatch, *arguments, "50 % RAC", "default")
    assert len(commands) == 2
    assert commands[0][:4] == ["torchrun", "-m", "racdeploy", "build"]
    assert commands[0][4] == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert commands[0][commands[0].index("--sparsity") + 1] == "0.5"
    assert "--sparsity" not in commands[1]

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()[4:]}
    assert rows["dense"].endswith("| 83.2% |")
    assert rows["50 % RAC"].endswith("| 66.4% |")
    assert "default" in rows

    broken = subprocess.CompletedProcess([], 4)
    monkeypatch.setattr(example.subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(SystemExit) as ended:
        run(example, monkeypatch, *arguments, "2:4 RAC")
    assert ended.value.code == 4

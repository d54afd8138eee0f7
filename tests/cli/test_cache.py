"""The cache: what builds left, how large it is, and what can be removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.files.stages import Stage
from tests.support.commands import environment, find_error_code


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished stage of 40 days ago, a new unfinished one, an unpacked file, and a stranger."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RACDEPLOY_WORK", str(tmp_path / "racdeploy"))
    folder = tmp_path / "racdeploy"

    old = Stage.locate(folder, "traces", {"a": 1})
    new = Stage.locate(folder, "prune", {"b": 2})
    for stage in (old, new):
        stage.folder.mkdir(parents=True)
        (stage.folder / ".lock").touch()
        (stage.folder / "data").write_bytes(bytes(1000))
    old.finish({})
    for file in old.folder.iterdir():
        os.utime(file, (time.time() - 40 * 86400,) * 2)

    (folder / "unpacked").mkdir()
    (folder / "unpacked" / "abc.gguf").write_bytes(bytes(5000))
    (folder / "my-notes").mkdir()
    return folder


def _run(*arguments: str) -> dict[str, list[dict[str, object]]]:
    done = CliRunner().invoke(app, ["cache", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
    return found


def test_what_lies_in_the_cache_is_listed(work: Path) -> None:
    """The largest first; what racdeploy did not make is not among it."""
    rows = _run("ls")["found"]
    states = [(str(row["name"]).partition("-")[0], row["state"]) for row in rows]
    assert states == [("abc.gguf", "unpacked"), ("traces", "finished"), ("prune", "unfinished")]
    assert rows[1]["idle_days"] == pytest.approx(40, abs=0.1)
    shown = CliRunner().invoke(app, ["cache", "ls"])
    assert "40 days ago" in shown.output
    assert "3 in all" in shown.output


def test_a_file_that_stages_share_counts_once(work: Path) -> None:
    """In all, its size; half of it in each of two stages."""
    sizes = {str(row["path"]): row["size_bytes"] for row in _run("ls")["found"]}
    (data,) = work.glob("traces-*/data")
    (stage,) = work.glob("prune-*")
    (stage / "shared").hardlink_to(data)
    for row in _run("ls")["found"]:
        change = {data.parent: -500, stage: 500}.get(Path(str(row["path"])), 0)
        assert row["size_bytes"] == sizes[str(row["path"])] + change


def test_old_ones_and_named_ones_are_removed(work: Path) -> None:
    """And nothing else."""
    (removed,) = _run("rm", "--older", "30")["found"]
    assert str(removed["name"]).startswith("traces-")
    assert not Path(str(removed["path"])).exists()

    _run("rm", "abc.gguf")
    assert not list((work / "unpacked").iterdir())
    assert len(list(work.glob("prune-*"))) == 1
    assert (work / "my-notes").is_dir()


@pytest.mark.parametrize(
    ("arguments", "code"), [([], "nothing-to-remove"), (["nothing"], "unknown-cache-entry")]
)
def test_nothing_is_removed_by_mistake(work: Path, arguments: list[str], code: str) -> None:
    """Neither without a choice, nor by a name that is not there."""
    done = CliRunner().invoke(app, ["cache", "rm", *arguments])
    assert (done.exit_code, find_error_code(done.output)) == (2, code)
    assert len(list(work.iterdir())) == 4


def test_a_folder_in_use_stays(work: Path) -> None:
    """Named, it is refused; by age, it is passed over."""
    (folder,) = work.glob("traces-*")
    code = (
        "import sys\nfrom pathlib import Path\nfrom racdeploy.files.locks import lock_folder\n"
        "lock_folder(Path(sys.argv[1]))\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert "in use" in {row["state"] for row in _run("ls")["found"]}
        refused = CliRunner().invoke(app, ["cache", "rm", folder.name])
        assert find_error_code(refused.output) == "work-folder-in-use"
        _run("rm", "--older", "0")
        holder.communicate(b"")
    assert folder.is_dir()
    assert not list(work.glob("prune-*"))

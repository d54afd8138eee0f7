"""Stage folders: whose they are, what is refused, and what is said of those that a kill left."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from racdeploy.files import locks
from racdeploy.files.stages import Stage, scratch_folder
from tests.support.commands import environment
from tests.support.errors import raises

INPUTS = {
    "version": "1",
    "code": "c" * 16,
    "model": "a" * 64,
    "traces_sha256": "b" * 64,
    "prune": {"damping": 0.01, "method": "sparsegpt"},
}


def test_a_stage_refuses_other_inputs_and_names_them(tmp_path: Path) -> None:
    """A folder whose recorded inputs differ from the asked ones is not resumed."""
    stage = Stage.open(tmp_path, "prune", {"model": "a", "seed": 1})
    record = stage.folder / "inputs.json"
    record.write_text(json.dumps({"model": "b", "seed": 1}))
    with raises("stage-of-other-inputs", ": model b -> a\n"):
        Stage.open(tmp_path, "prune", {"model": "a", "seed": 1})


@pytest.mark.parametrize("key", ["model", "prune", "traces_sha256", "code"])
def test_a_stage_made_from_other_inputs_is_refused_by_name(tmp_path: Path, key: str) -> None:
    """A folder whose record of model, recipe, traces or code is another one is not resumed."""
    record = Stage.open(tmp_path, "prune", INPUTS).folder / "inputs.json"
    changed = json.loads(record.read_text())
    changed[key] = {"damping": 0.1, "method": "sparsegpt"} if key == "prune" else "d" * 16
    record.write_text(json.dumps(changed))
    named = "prune.damping 0.1 -> 0.01" if key == "prune" else key
    with raises("stage-of-other-inputs", f": {named}\n"):
        Stage.open(tmp_path, "prune", INPUTS)


def _other(**changed: Any) -> dict[str, Any]:
    return INPUTS | {"prune": INPUTS["prune"] | changed.pop("prune", {}), **changed}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prune": {"damping": 0.02}}, ["prune.damping 0.01 -> 0.02"]),
        (
            {"prune": {"method": "admm", "damping": 0.0}},
            ["prune.damping 0.01 -> 0.0", "prune.method sparsegpt -> admm"],
        ),
        ({"code": "d" * 16}, ["code"]),
        ({"version": "2", "code": "d" * 16}, ["code", "version 1 -> 2"]),
        ({"traces_sha256": "d" * 64}, ["traces_sha256"]),
        ({"model": "d" * 64, "traces_sha256": "e" * 64}, ["model", "traces_sha256"]),
        ({"torch": {"torch": "2"}}, ["torch.torch null -> 2"]),
    ],
)
def test_a_stage_that_starts_from_scratch_names_what_was_left_unfinished(
    tmp_path: Path, changed: dict[str, Any], said: list[str]
) -> None:
    """With what changed, and both ways out; it is said once, and the old stage can be resumed."""
    old = Stage.open(tmp_path, "prune", INPUTS)
    new = Stage.open(tmp_path, "prune", _other(**changed))
    left = f"{old.folder} was left unfinished, with other inputs: {', '.join(said)}"
    assert f"{left}; {new.folder.name} starts from scratch\n" in new.notice
    assert new.notice.endswith(f"undo the change; to remove it: rm -r {old.folder}")
    assert not Stage.open(tmp_path, "prune", _other(**changed)).notice
    assert Stage.open(tmp_path, "prune", INPUTS) == old


def test_a_stage_of_another_release_is_named_when_it_is_computed_again(tmp_path: Path) -> None:
    """After an upgrade; nothing is said where the code alone changed, or the recipe too."""
    old = Stage.open(tmp_path, "prune", INPUTS)
    old.finish({})
    for quiet in ({"code": "d" * 16}, {"version": "2", "prune": {"damping": 0.02}}):
        stage = Stage.open(tmp_path, "prune", _other(**quiet))
        assert not stage.notice
        shutil.rmtree(stage.folder)

    new = Stage.open(tmp_path, "prune", _other(version="2", code="d" * 16))
    assert new.notice == f"{old.folder} is of racdeploy 1: {new.folder.name} is computed again"


@contextmanager
def told_when_waiting(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Write a line to a process as soon as this one says that it waits."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

    logger, handler = logging.getLogger("racdeploy"), Handler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def start_python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a program that this process writes to, and reads from."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment())


def test_a_second_process_waits_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the first one ends, if nobody can wait for this one."""
    caplog.set_level("INFO", "racdeploy")
    monkeypatch.setattr(locks, "_locks", {})
    holding = (
        "import sys\nimport racdeploy.files.locks as locks\n"
        "locks.lock_folder(locks.Path(sys.argv[1])); print(flush=True); sys.stdin.readline()"
    )
    with start_python(holding, tmp_path) as process, told_when_waiting(process):
        assert process.stdout
        assert process.stdout.readline()
        locks.lock_folder(tmp_path)
        assert process.wait() == 0
    assert caplog.messages == [
        f"another racdeploy is working in {tmp_path}: waiting until it is done"
    ]
    locks.release_folder(tmp_path)


def test_a_process_holds_a_folder_by_any_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that builds in work, then in the same folder by its whole path or a link."""
    monkeypatch.setattr(locks, "_locks", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path)
    stage = Stage.open(Path("work"), "export", INPUTS)
    Stage.open(tmp_path / "work", "export", INPUTS)
    other = Stage.open(Path("linked/work"), "export", INPUTS)
    assert locks.is_folder_in_use(other.folder) is False
    other.release()
    assert locks._locks == {}
    stage.release()


def test_a_stage_is_made_again_where_the_one_before_removes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a verification does at its end, while the same one waits for it."""
    caplog.set_level("INFO", "racdeploy")
    monkeypatch.setattr(locks, "_locks", {})
    removing = (
        "import json, sys, racdeploy.files.stages as s\n"
        "stage = s.Stage.open(s.Path(sys.argv[1]), 'verify', json.loads(sys.argv[2]))\n"
        "print(flush=True); sys.stdin.readline(); stage.remove(); sys.stdin.read()"
    )
    with (
        start_python(removing, tmp_path, json.dumps(INPUTS)) as process,
        told_when_waiting(process),
    ):
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline()
        stage = Stage.open(tmp_path, "verify", INPUTS)
        process.stdin.close()
        assert process.wait() == 0
    assert locks.is_folder_in_use(stage.folder) is False, "it is this process's"
    assert sorted(file.name for file in stage.folder.iterdir()) == [".lock", "inputs.json"]
    locks.release_folder(stage.folder)


def test_a_folder_is_removed_while_others_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They make its lock file at any moment, so also between the last file and the folder."""
    stage = Stage.open(tmp_path, "verify", INPUTS)
    rmdir = os.rmdir

    def make_lock_before(path: Any, **options: Any) -> None:
        with suppress(FileNotFoundError):
            (stage.folder / ".lock").touch()
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", make_lock_before)
    stage.remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_said_of_what_is_no_concern_of_the_run(tmp_path: Path) -> None:
    """Finished stages, other kinds, another model and recipe, stages that another process uses."""
    Stage.open(tmp_path, "prune", INPUTS).finish({})
    Stage.open(tmp_path, "traces", INPUTS)
    Stage.open(tmp_path, "prune", _other(model="d" * 64, prune={"damping": 0.5}))
    running = (
        "import json, sys, racdeploy.files.stages as s\n"
        "s.Stage.open(s.Path(sys.argv[1]), 'prune', json.loads(sys.argv[2]))\n"
        "print(flush=True), sys.stdin.read()"
    )
    inputs = _other(prune={"damping": 0.3})
    command = [sys.executable, "-c", running, str(tmp_path), json.dumps(inputs)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout
        assert process.stdout.readline()
        assert not Stage.open(tmp_path, "prune", _other(prune={"damping": 0.02})).notice
        with raises("work-folder-in-use"):
            Stage.open(tmp_path, "prune", inputs)
        process.kill()
    notice = Stage.open(tmp_path, "prune", _other(prune={"damping": 0.04})).notice
    assert "prune.damping 0.02 -> 0.04" in notice or "prune.damping 0.3 -> 0.04" in notice
    assert "(also unfinished: prune-" in notice


def test_what_a_kill_left_half_written_is_removed_when_the_stage_goes_on(tmp_path: Path) -> None:
    """Files and folders under their temporary names, also within the pruned model; nothing else."""
    stage = Stage.open(tmp_path, "prune", INPUTS)
    model = stage.folder / "model"
    model.mkdir()
    (stage.folder / ".block-00001.safetensors.123.partial").write_bytes(b"half")
    (model / ".other.partial").mkdir()
    (model / ".other.partial/config.json").write_bytes(b"{}")
    (model / "config.json").write_bytes(b"{}")
    Stage.open(tmp_path, "prune", INPUTS)
    names = {file.relative_to(stage.folder).as_posix() for file in stage.folder.rglob("*")}
    assert names == {".lock", "inputs.json", "model", "model/config.json"}


def test_the_scratch_folder_of_a_killed_process_goes_with_the_next_one(tmp_path: Path) -> None:
    """That of a running process stays; each says whose it is."""
    holding = (
        "import sys, racdeploy.files.stages as s\n"
        "with s.scratch_folder(s.Path(sys.argv[1]), int(sys.argv[2])) as folder:\n"
        "    print(folder, flush=True), sys.stdin.read()"
    )
    processes = []
    for rank in (1, 2):
        command = [sys.executable, "-c", holding, str(tmp_path), str(rank)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        processes.append(process)
    first, second = (
        Path(process.stdout.readline().strip()) for process in processes if process.stdout
    )
    assert first.name.startswith("scratch-of-process-1-")
    assert second.name.startswith("scratch-of-process-2-")
    processes[0].kill()
    processes[0].communicate()
    assert sorted(tmp_path.iterdir()) == [first, second]
    with scratch_folder(tmp_path, 3) as own:
        assert sorted(tmp_path.iterdir()) == [second, own]
    processes[1].communicate("")
    assert not list(tmp_path.iterdir())


def test_a_summary_that_lacks_a_figure_is_damaged(tmp_path: Path) -> None:
    stage = Stage.open(tmp_path, "traces", {"a": 1})
    stage.finish({"tokens": 3})
    assert stage.summary["tokens"] == 3
    (stage.folder / "stage.json").write_text("{}", encoding="utf-8")
    with raises("damaged-stage", "tokens"):
        stage.summary["tokens"]

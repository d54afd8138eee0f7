"""Two processes of one number, as in two containers, share a cache: never a wrong byte."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from racdeploy.packing.packers import bitmask
from racdeploy.processes.child_process import environment
from tests.support.tiny_gguf import random_rows, write_gguf

RACES = 50
# Each process says that it is process 1, and that it is ready; it unpacks when it is told to.
RACER = """
import hashlib, os, shutil, sys
from pathlib import Path
os.getpid = lambda: 1
from racdeploy.packing import racgguf
for line in sys.stdin:
    file = racgguf.unpack_to_cache(Path(sys.argv[1]))
    print(hashlib.sha256(file.read_bytes()).hexdigest(), flush=True)
"""
APART = ["unshare", "--pid", "--fork", "--kill-child"]


def _can_be_apart() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.answers("H3")
@pytest.mark.parametrize("apart", [False, True], ids=["said to be 1", "in its own namespace"])
def test_processes_of_one_number_unpack_at_once_and_get_the_right_bytes(
    tmp_path: Path, apart: bool
) -> None:
    """Fifty times at the same moment, each time into an empty cache."""
    if apart and not _can_be_apart():
        pytest.skip("this user may not make a PID namespace")

    rows = random_rows("q8_0", 512, 1024, 0.5)
    plain = write_gguf(tmp_path / "m.gguf", {"w": ("q8_0", rows)})
    packed = tmp_path / "m.racgguf"
    bitmask.pack_file(plain, packed)
    expected = hashlib.sha256(plain.read_bytes()).hexdigest()

    cache = tmp_path / "cache"
    command = [sys.executable, "-c", RACER, str(packed)]
    if apart:
        command = [*APART, *command]
    racers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment() | {"XDG_CACHE_HOME": str(cache)},
            text=True,
        )
        for _ in range(2)
    ]

    try:
        for _ in range(RACES):
            shutil.rmtree(cache, ignore_errors=True)
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("go\n")
                racer.stdin.flush()
            for racer in racers:
                assert racer.stdout is not None
                assert expected == racer.stdout.readline().strip()
            left = [name for _, _, names in os.walk(cache) for name in names if "partial" in name]
            assert not left
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


WRITER = """
import sys
from pathlib import Path
from racdeploy.files.writing import atomic_folder
out = Path(sys.argv[1])
for line in sys.stdin:
    with atomic_folder(out) as scratch:
        for number in range(5):
            (scratch / str(number)).write_text(sys.argv[2])
    print("done", flush=True)
"""


@pytest.mark.answers("L5")
def test_folders_written_to_one_place_at_once_are_whole(tmp_path: Path) -> None:
    """Neither writer fails, the last one's is there, and nothing beside it; an older one goes."""
    out = tmp_path / "bundle"
    out.mkdir()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(out), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        for name in ("one", "two")
    ]

    try:
        for _ in range(4 * RACES):
            for writer in writers:
                assert writer.stdin is not None
                writer.stdin.write("go\n")
                writer.stdin.flush()
            for writer in writers:
                assert writer.stdout is not None
                line = writer.stdout.readline()
                assert line == "done\n", writer.stderr and writer.stderr.read()
            texts = {file.read_text() for file in out.iterdir()}
            assert len(texts) == 1
            assert len(list(out.iterdir())) == 5
            assert [out] == list(tmp_path.iterdir())
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()

"""Repositories of the Hub that somebody made to hurt: names, sizes, manifests, and folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from racdeploy.bundles.hub import remote
from racdeploy.bundles.hub.layout import explain_bad_name
from racdeploy.bundles.hub.pull import pull
from racdeploy.errors import ArtifactError, EnvironmentFailure, UsageError
from racdeploy.files.writing import atomic_folder
from tests.support import hub_server as hub_module
from tests.support.errors import raises
from tests.support.fake_bundle import make_fake_bundle, read_files
from tests.support.hub_server import Hub, Repository, hub_server, point_at
from tests.support.waiting import PATIENCE_S

NAME = "evil/model"
OWN = "racdeploy/thinker-1B-rac-v1.0-Q8_0"
MANIFEST = f"{OWN}/racdeploy.json"
HOSTILE = (
    "../escaped",
    "a/../../escaped",
    "/tmp/escaped",
    "..\\escaped",
    "C:escaped",
    "a//b",
    "a/./b",
    ".cache/huggingface/download/x.metadata",
    ".git/hooks/post-checkout",
    "CON",
    "aux.txt",
    "a/nul.json",
    "a/COM1",
    "trailing.",
    "trailing ",
    " leading",
    "line\nbreak",
    "\x1b[2Jclear",
    "right\u202eto-left",
    "question?",
    "stream:ads",
    "a" * 256,
    "/".join("abcdefghi"),
    "",
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as server:
        point_at(server.address, monkeypatch)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server


def _serve(hub: Hub, tmp_path: Path, files: dict[str, bytes], **manifest: Any) -> None:
    """Put a bundle into a repository, with further files and another manifest."""
    bundle = read_files(make_fake_bundle(tmp_path / "made"))
    described = json.loads(bundle["racdeploy.json"]) | manifest
    names = {f"{OWN}/{path}": content for path, content in bundle.items()}
    tops = {path: content for path, content in bundle.items() if path.endswith(".gguf")}
    there = {**names, **tops, MANIFEST: json.dumps(described).encode(), **files}
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(there)


def _left(tmp_path: Path) -> set[str]:
    """Return what lies outside the folder that was pulled into."""
    return set(read_files(tmp_path)) - {f"made/{path}" for path in read_files(tmp_path / "made")}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_no_plain_path_is_not_written(hub: Hub, tmp_path: Path, name: str) -> None:
    """Neither as a file of a bundle nor as an artifact; nothing is written at all."""
    assert explain_bad_name(name)
    _serve(hub, tmp_path, {f"{OWN}/{name}": b"pwned"})
    with pytest.raises(ArtifactError):
        pull(NAME, Path("out"))
    assert _left(tmp_path) == set()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", ".git/config", "a/nul"])
def test_an_artifact_with_such_a_name_is_not_written(hub: Hub, tmp_path: Path, name: str) -> None:
    entry = json.loads(read_files(make_fake_bundle(tmp_path / "made"))["racdeploy.json"])
    (artifact,) = entry["artifacts"]
    artifact |= {"path": name, "files": {name: artifact["sha256"]}}
    _serve(hub, tmp_path, {name: b"pwned"}, artifacts=[artifact])
    with pytest.raises(ArtifactError):
        pull(NAME, Path("out"))
    assert _left(tmp_path) == set()


@pytest.mark.parametrize(
    "name", ["model.gguf", "onnx/model_q8.onnx", "a-b_c.d/é.json", "README.md"]
)
def test_a_plain_name_is_written(name: str) -> None:
    assert explain_bad_name(name) == ""


def test_two_names_that_some_systems_hold_for_one_are_refused(hub: Hub, tmp_path: Path) -> None:
    _serve(hub, tmp_path, {f"{OWN}/Tokenizer.JSON": b"{}"})
    with raises("hub-names-collide", "Tokenizer.JSON"):
        pull(NAME, Path("out"))


def test_the_default_folder_is_what_the_user_typed(hub: Hub, tmp_path: Path) -> None:
    _serve(hub, tmp_path, {})
    assert pull(NAME).folder == Path("model")
    assert _left(tmp_path) == {f"here/model/{path}" for path in read_files(tmp_path / "made")}


def test_files_that_other_bundles_have_are_not_written(hub: Hub, tmp_path: Path) -> None:
    """What is neither in the bundle's folder nor named by its manifest stays where it is."""
    _serve(hub, tmp_path, {"malware.sh": b"#!", "racdeploy/other/racdeploy.txt": b"x"})
    pull(NAME, Path("out"))
    assert set(read_files(Path("out"))) == set(read_files(tmp_path / "made"))


@pytest.mark.parametrize(
    ("manifest", "code"),
    [
        (b"{", "invalid-json"),
        (b"[" * 100_000, "invalid-json"),
        (b"[]", "json-not-an-object"),
        (b"{}", "invalid-manifest"),
        (b"\xff\xfe", "file-not-utf8"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    hub: Hub, tmp_path: Path, manifest: bytes, code: str
) -> None:
    _serve(hub, tmp_path, {MANIFEST: manifest})
    with raises(code, MANIFEST):
        pull(NAME, Path("out"))
    assert not Path("out").exists()


def test_sizes_are_bounded_before_anything_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    """A manifest of a gigabyte is not read, and more than the disk holds is not begun."""
    _serve(hub, tmp_path, {})
    hub.sizes = {MANIFEST: 1 << 30}
    with raises("hub-too-large", MANIFEST):
        pull(NAME, Path("out"))

    hub.sizes = {f"{OWN}/report.json": 1 << 60}
    with raises("disk-full"):
        pull(NAME, Path("out"))
    assert not [line for line in hub.asked if "report.json" in line]


@pytest.mark.parametrize("size", ["x", None, -1, 1.5, [], {}])
def test_a_size_that_is_none_is_refused(hub: Hub, tmp_path: Path, size: Any) -> None:
    """Whatever the listing says, it is an error of ours that ends the pull."""
    _serve(hub, tmp_path, {})
    hub.sizes = {f"{OWN}/report.json": size}
    with pytest.raises((ArtifactError, EnvironmentFailure)):
        pull(NAME, Path("out"))
    assert not Path("out").exists()


def test_a_repository_of_too_many_files_is_refused(hub: Hub, tmp_path: Path) -> None:
    _serve(hub, tmp_path, {f"x{number}": b"" for number in range(10_001)})
    with raises("hub-too-large", "10,000 files"):
        pull(NAME, Path("out"))


def test_a_repository_of_too_many_bundles_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Each would be read."""
    _serve(hub, tmp_path, {f"racdeploy/b{n}/racdeploy.json": b"{}" for n in range(101)})
    with raises("hub-too-large", "100 bundles"):
        pull(NAME, Path("out"))
    assert not [line for line in hub.asked if "/resolve/" in line]


def test_links_that_wait_for_a_pull_are_not_followed(hub: Hub, tmp_path: Path) -> None:
    """An archive may bring the folder in which files arrive."""
    _serve(hub, tmp_path, {})
    (tmp_path / "victim").write_text("mine")
    waiting = Path(".out.pull")
    waiting.mkdir()
    (waiting / "thinker-1B-rac-v1.0-Q8_0.gguf").symlink_to(tmp_path / "victim")
    pull(NAME, Path("out"))
    assert (tmp_path / "victim").read_text() == "mine"
    assert not waiting.exists()

    (tmp_path / "elsewhere").mkdir()
    waiting.symlink_to(tmp_path / "elsewhere")
    pull(NAME, Path("again"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_texts_of_the_hub_cannot_move_the_cursor(hub: Hub) -> None:
    """What it says is one short line without control characters."""
    hub.failures = {"GET /api": (403, "no\u001b[2J" + "x" * 1000)}
    with pytest.raises(UsageError) as caught:
        pull(NAME, Path("out"))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("planted", ["a link", "a link inside", "a folder for all"])
def test_what_is_planted_where_files_arrive_is_not_used(
    hub: Hub, tmp_path: Path, planted: str
) -> None:
    """Its name can be foreseen: nothing is written through a link, and nothing of it is taken."""
    _serve(hub, tmp_path, {})
    victim, partial = tmp_path / "victim", Path(".out.pull")
    victim.mkdir()
    if planted == "a link":
        partial.symlink_to(victim)
    else:
        partial.mkdir()
    if planted == "a link inside":
        (partial / "racdeploy").symlink_to(victim)
    if planted == "a folder for all":
        partial.chmod(0o777)
        (partial / "planted").write_text("")

    pull(NAME, Path("out"))
    assert list(victim.iterdir()) == []
    assert not os.path.lexists(partial)
    assert not (Path("out") / "planted").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone gives away")
def test_a_folder_of_another_user_is_refused(hub: Hub, tmp_path: Path) -> None:
    _serve(hub, tmp_path, {})
    Path(".out.pull").mkdir()
    os.chown(".out.pull", 12345, -1)
    with raises("folder-not-yours", ".out.pull", "12345"):
        pull(NAME, Path("out"))
    assert list(Path(".out.pull").iterdir()) == []


def test_what_arrives_is_for_this_user_alone(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an older version has left a folder that others may read."""
    _serve(hub, tmp_path, {})
    Path(".out.pull").mkdir(0o755)
    modes = []

    def note_mode(folder: Path) -> AbstractContextManager[Path]:
        modes.append(Path(".out.pull").stat().st_mode & 0o777)
        return atomic_folder(folder)

    monkeypatch.setattr("racdeploy.bundles.hub.pull.atomic_folder", note_mode)
    pull(NAME, Path("out"))
    assert modes == [0o700]


def test_a_hub_that_takes_for_ever_is_left(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its answers may come within the client's own limits."""
    monkeypatch.setattr(remote, "_MAX_WAIT_S", 0.2)
    hub.slow_s = 2.0
    with raises("hub-too-slow"):
        pull(NAME, Path("out"))
    assert not Path("out").exists()


_LEAVING = """
import threading
from concurrent.futures import ThreadPoolExecutor
from racdeploy.bundles.hub import remote

def download():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(threading.Event().wait).result()

remote._MAX_WAIT_S = 0.2
remote.HubRepository("org/name", "").call(download)
"""


def test_a_program_ends_while_the_client_still_waits() -> None:
    """It downloads in threads that Python would wait for: as long as the Hub sends a byte."""
    done = subprocess.run(
        [sys.executable, "-c", _LEAVING],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "took more than 0 s" in done.stderr


@pytest.mark.parametrize("sha", [None, "../../../../x", "main", "A" * 40, "0" * 40 + "\n"])
def test_a_listing_without_a_commit_is_an_error(
    sha: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub only asserts that there is something, and makes paths of it."""
    write = hub_module._json
    monkeypatch.setattr(hub_module, "_json", lambda value: write({**value, "sha": sha}))
    _serve(hub, tmp_path, {})
    before = sorted(tmp_path.rglob("*"))
    with raises("hub-answers-oddly"):
        pull(NAME, Path("out"))
    assert not Path("out").exists()
    assert sorted(tmp_path.rglob("*")) == before

"""Files that change, or only seem to, after they were compared with a hash or a signature."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import racdeploy
from racdeploy.api import verifications
from racdeploy.api.options import VerifyOptions
from racdeploy.bundles.bundle import BundleToVerify
from racdeploy.engines.engine import Progress
from racdeploy.files import sha256_cache
from racdeploy.files.sha256_cache import has_sha256, refuse_changed, take_states
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest
from tests.support.errors import raises
from tests.support.fake_bundle import make_fake_bundle
from tests.support.tiny_artifacts import make_bundle


@contextmanager
def _linking(file: Path) -> Iterator[None]:
    """Make and remove hard links of a file all the time, as backups do."""
    ends = threading.Event()

    def work() -> None:
        link = file.with_name("link")
        while not ends.is_set():
            os.link(file, link)
            link.unlink()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.takes(6, "loads beside a busy thread")
def test_a_bundle_loads_while_links_to_its_files_come_and_go(tmp_path: Path) -> None:
    """The ctime moves at every look; the content stays."""
    bundle = make_bundle(tmp_path)
    with _linking(bundle / "model.gguf"):
        for _ in range(3):
            racdeploy.load(bundle).close()


def _touch(file: Path) -> None:
    os.utime(file)


def _copy(file: Path) -> None:
    shutil.copy(file, file.with_name("copy"))
    file.with_name("copy").replace(file)


def _chmod(file: Path) -> None:
    file.chmod(0o600)


def _write(file: Path) -> None:
    state = file.stat()
    with file.open("r+b") as stream:
        stream.seek(70_001)
        stream.write(b"!")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def _replace(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[70_001] ^= 1
    file.with_name("copy").write_bytes(content)
    file.with_name("copy").replace(file)


def _cut(file: Path) -> None:
    os.truncate(file, 100_000)


@pytest.mark.parametrize("act", [_touch, _copy, _chmod])
def test_the_content_decides_whether_a_file_has_changed(
    tmp_path: Path, act: Callable[[Path], None]
) -> None:
    """Not its times, its inode or its mode."""
    file = tmp_path / "m"
    file.write_bytes(bytes(range(256)) * 4096)
    states = take_states(tmp_path, ["m"])
    act(file)
    refuse_changed(tmp_path, {"m": file_sha256(file)}, states)


@pytest.mark.parametrize("act", [_write, _replace, _cut])
def test_another_content_is_a_change(tmp_path: Path, act: Callable[[Path], None]) -> None:
    """Also where a time was set back."""
    file = tmp_path / "m"
    file.write_bytes(bytes(range(256)) * 4096)
    sha256 = file_sha256(file)
    states = take_states(tmp_path, ["m"])
    act(file)
    with raises("artifact-changed", "/m changed while it was in use"):
        refuse_changed(tmp_path, {"m": sha256}, states)


def test_a_hash_counts_though_links_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed once, and not remembered."""
    file = tmp_path / "m"
    file.write_bytes(b"content")
    sha256, read = file_sha256(file), []

    def link_and_hash(path: Path) -> str:
        os.link(path, path.with_name(f"link{len(read)}"))
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(sha256_cache, "file_sha256", link_and_hash)
    assert has_sha256(file, sha256)
    assert len(read) == 1
    assert not list((tmp_path / "cache").rglob("*.json"))


def _verify(
    folder: Path, monkeypatch: pytest.MonkeyPatch, during: Callable[[], object]
) -> list[str]:
    """Verify a bundle with checks that do nothing but ``during``; return what was checked."""
    checked: list[str] = []
    bundle = BundleToVerify(folder, None, "")
    vars(bundle)["contents"] = SimpleNamespace(manifest=Manifest.read(folder))

    def run() -> tuple[Any, ...]:
        during()
        bundle.refuse_changes()
        return None, ()

    def check(options: VerifyOptions) -> tuple[str, ...]:
        checked.append(str(options.bundle))
        return ()

    def open_verification(
        options: VerifyOptions, progress: Progress | None
    ) -> tuple[Any, tuple[str, ...]]:
        return verification, check(options)

    verification = SimpleNamespace(run=run, gate=None)
    monkeypatch.setattr(verifications, "open_verification", open_verification)
    monkeypatch.setattr(verifications, "check_signature", check)
    made = SimpleNamespace(from_report=lambda *values, **others: None)
    monkeypatch.setattr(verifications, "Verdict", made)
    racdeploy.verify(folder)
    return checked


NAMES = ("racdeploy.json", "records.jsonl", "report.json", "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "thinker-1B-rac-v1.0-Q8_0.gguf"])
def test_a_file_that_is_replaced_while_it_is_verified_ends_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The records and the manifest were read before; there is no verdict."""
    folder = make_fake_bundle(tmp_path / "b")

    def replace() -> None:
        (tmp_path / "evil").write_bytes(b"other")
        (tmp_path / "evil").replace(folder / name)

    with raises("artifact-changed", name):
        _verify(folder, monkeypatch, replace)


def test_a_signature_is_checked_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links and files that nothing uses, as those of reports, are no change."""
    folder = make_fake_bundle(tmp_path / "b")
    (folder / "pipe").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")

    def act() -> None:
        for name in NAMES:
            os.link(folder / name, tmp_path / name)
        (folder / "report.html").write_text("made")

    assert _verify(folder, monkeypatch, act) == [str(folder)] * 2


def test_an_artifact_that_differs_from_its_manifest_is_still_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its bytes: that check fails, and the others tell what is lost."""
    folder = make_fake_bundle(tmp_path / "b")
    (artifact,) = [*folder.glob("*Q8_0.gguf")]
    artifact.write_bytes(artifact.read_bytes() + b"more")
    assert len(_verify(folder, monkeypatch, lambda: None)) == 2


def test_bench_notices_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures would be those of another file."""
    from racdeploy.bundles import bench

    bundle = make_bundle(tmp_path)

    def change_file(*values: object, **named: object) -> None:
        (bundle / "model.gguf").write_bytes(b"x")

    monkeypatch.setattr(bench, "measure_pair", change_file)
    load = bench.BenchSettings(prompt_tokens=8, new_tokens=8)
    with raises("artifact-changed", "model.gguf"):
        bench.bench(bundle, bundle / "model.gguf", load)


@pytest.mark.parametrize("mode", [0o666, 0o602, 0o644])
def test_a_check_of_a_file_that_all_may_write_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """They may have it mapped, and change it without a trace."""
    monkeypatch.setattr(sha256_cache, "_SETTLED_S", -1.0)
    file = tmp_path / "m"
    file.write_bytes(b"content")
    file.chmod(mode)
    (tmp_path / "link").symlink_to(file)
    for path in (file, tmp_path / "link"):
        assert has_sha256(path, file_sha256(file))
    remembered = len([*(tmp_path / "cache").rglob("*.json")])
    assert remembered == (mode == 0o644)


def test_a_check_of_another_users_file_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may give himself the right to write."""
    monkeypatch.setattr(sha256_cache, "_SETTLED_S", -1.0)
    monkeypatch.setattr(sha256_cache, "explain_foreign", lambda path: "another user's")
    (tmp_path / "m").write_bytes(b"content")
    assert has_sha256(tmp_path / "m", file_sha256(tmp_path / "m"))
    assert not [*(tmp_path / "cache").rglob("*.json")]

"""``ORG/NAME:QUANT``: the one GGUF file of a repository with that quant, from a Hub on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from racdeploy.models.sources import fetch_gguf, resolve_model
from tests.support import hub_server
from tests.support.errors import raises
from tests.support.hub_server import Hub, Repository, point_at

FILES = {
    name: name.encode()
    for name in (
        "README.md",
        "tiny-Q4_K_M.gguf",
        "tiny-Q4_K_S.gguf",
        "tiny-UD-Q4_K_XL.gguf",
        "tiny.q8_0.gguf",
        "mmproj-F16.gguf",
        "BF16/tiny-BF16-00002-of-00002.gguf",
        "BF16/tiny-BF16-00001-of-00002.gguf",
        "[a]/tiny-Q6_K.gguf",
        "a/tiny-Q6_K.gguf",
        "old/tiny-F32.gguf",
        "tiny-F32.gguf",
    )
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with one repository; the client's cache is a folder of the test."""
    fetch_gguf.cache_clear()
    with hub_server.hub_server() as server:
        point_at(server.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        server.repositories["org/tiny-GGUF"] = Repository()
        server.repositories["org/tiny-GGUF"].commit(FILES)
        yield server
    fetch_gguf.cache_clear()


@pytest.mark.parametrize(
    ("quant", "file"),
    [
        ("q4_k_m", "tiny-Q4_K_M.gguf"),
        ("Q8_0", "tiny.q8_0.gguf"),
        ("Q4_K_XL", "tiny-UD-Q4_K_XL.gguf"),
        ("ud-q4_k_xl", "tiny-UD-Q4_K_XL.gguf"),
    ],
)
def test_the_quant_names_the_file(hub: Hub, quant: str, file: str) -> None:
    """In any case; nothing else is downloaded, and it is asked for once."""
    found = fetch_gguf(Path(f"org/tiny-GGUF:{quant}"))
    assert (found.name, found.read_bytes()) == (file, file.encode())
    assert fetch_gguf(Path(f"org/tiny-GGUF:{quant}")) == found
    downloads = [each for each in hub.asked if each.startswith("GET") and "resolve" in each]
    assert [each.rpartition("/")[2] for each in downloads] == [file]


def test_all_parts_of_a_split_file_are_downloaded(hub: Hub) -> None:
    found = fetch_gguf(Path("org/tiny-GGUF:bf16"))
    assert found.name == "tiny-BF16-00001-of-00002.gguf"
    assert found.with_name("tiny-BF16-00002-of-00002.gguf").is_file()


@pytest.mark.parametrize("quant", ["q4_k", "q2_k", "f16", "f32", "q6_k", "m", "tiny"])
def test_without_one_file_the_quants_are_listed(hub: Hub, quant: str) -> None:
    """None, or several; the projector of images is no model."""
    with raises("no-such-quant", "BF16, F32, Q4_K_M, Q4_K_S, Q4_K_XL, Q6_K, q8_0"):
        fetch_gguf(Path(f"org/tiny-GGUF:{quant}"))


def test_a_repository_without_gguf_or_none_at_all(hub: Hub) -> None:
    hub.repositories["org/other"] = Repository()
    hub.repositories["org/other"].commit({"model.safetensors": b""})
    with raises("no-such-quant", "no GGUF file at all"):
        fetch_gguf(Path("org/other:q4_0"))
    with raises("no-model-from-hub", "org/missing"):
        fetch_gguf(Path("org/missing:q4_0"))


@pytest.mark.parametrize("sha", ["../../../../x", "main", "A" * 40])
@pytest.mark.parametrize("get", [resolve_model, lambda name: fetch_gguf(Path(f"{name}:q8_0"))])
def test_a_commit_that_is_none_is_no_path(
    sha: str, get: Callable[[str], object], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, in the client's cache or out of it."""
    write = hub_server._json
    monkeypatch.setattr(hub_server, "_json", lambda value: write({**value, "sha": sha}))
    with raises("hub-answers-oddly", sha):
        get("org/tiny-GGUF")
    assert list(Path().iterdir()) == []


def test_a_downloaded_model_is_found_without_the_hub(hub: Hub) -> None:
    """As where the network is down; a model that was never downloaded is not."""
    hub.repositories["org/tiny"] = Repository()
    commit = hub.repositories["org/tiny"].commit({"config.json": b"{}"})
    downloaded = resolve_model("org/tiny")
    assert downloaded.revision == commit
    assert (downloaded.folder / "config.json").read_bytes() == b"{}"

    del hub.repositories["org/tiny"]
    assert resolve_model("org/tiny") == downloaded
    with raises("no-model-from-hub", "org/missing"):
        resolve_model("org/missing")


@pytest.mark.parametrize("source", ["model.gguf", "/tmp/a/b:c", "a/b/c:d", "org/name", "C:/x.gguf"])
def test_other_paths_stay(hub: Hub, source: str) -> None:
    """And so does a file whose name has a colon."""
    assert fetch_gguf(Path(source)) == Path(source)
    Path("org").mkdir()
    Path("org/tiny-GGUF:q8_0").touch()
    assert fetch_gguf(Path("org/tiny-GGUF:q8_0")) == Path("org/tiny-GGUF:q8_0")
    assert hub.asked == []

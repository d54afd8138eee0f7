"""``racdeploy push``: what lies where in a repository, and what is never overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.bundles.hub.conftest import Run
from tests.support.fake_bundle import make_fake_bundle
from tests.support.hub_server import READS, Hub, Repository

NAME = "me/thinker-1B-RAC-GGUF"
OWN = "racdeploy/thinker-1B-rac-v1.0-Q8_0"


def _files(hub: Hub, name: str = NAME, branch: str = "main") -> dict[str, bytes]:
    return hub.repositories[name].files(branch)


def _card(hub: Hub) -> tuple[dict[str, object], str]:
    _, metadata, body = _files(hub)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_a_dry_run_shows_all_and_writes_nothing(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with sizes, the card, the address; without a token."""
    monkeypatch.delenv("HF_TOKEN")
    done = run("push", make_fake_bundle(tmp_path / "b"), NAME, "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"{OWN}/racdeploy.json" in done.stdout
    assert "thinker-1B-rac-v1.0-Q8_0.gguf" in done.stdout
    assert "9 kB" in done.stdout
    assert "base_model_relation: quantized" in done.stdout
    assert done.stdout.rstrip().endswith(f"{hub.address}/{NAME}")
    assert {line.partition(" ")[0] for line in hub.asked} == {"GET"}


def test_artifacts_lie_at_the_top_and_the_rest_in_the_bundles_folder(
    run: Run, hub: Hub, tmp_path: Path
) -> None:
    """As quantizers lay out theirs; large files go through LFS, with the same bytes."""
    bundle = make_fake_bundle(tmp_path / "b")
    done = run("push", bundle, NAME, "--private")
    assert done.exit_code == 0, done.output

    files = _files(hub)
    main = "thinker-1B-rac-v1.0-Q8_0.gguf"
    top = {path for path in files if "/" not in path}
    assert top == {"README.md", main, main.replace(".gguf", ".imatrix.gguf")}
    assert files[main] == (bundle / main).read_bytes()
    assert files[f"{OWN}/README.md"] == b"# a card\n"
    assert files[f"{OWN}/racdeploy.json"] == (bundle / "racdeploy.json").read_bytes()
    assert files[main] in hub.large.values()
    assert hub.repositories[NAME].private
    assert hub.repositories[NAME].messages == ["Add thinker-1B-rac-v1.0-Q8_0 with racdeploy"]


def test_the_card_has_what_the_hub_reads(run: Run, hub: Hub, tmp_path: Path) -> None:
    """Metadata, a row for each file with what was measured, and commands that name the quant."""
    run("push", make_fake_bundle(tmp_path / "b"), NAME)
    metadata, body = _card(hub)
    assert metadata == {
        "license": "apache-2.0",
        "base_model": "acme/thinker-1B",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "racdeploy",
        "tags": ["racdeploy", "sparse", "reasoning", "gguf"],
    }
    assert "| q8_0 | 9 kB | 50.0% | 98.5% (98.5%) | 1.01 | pass |" in body
    assert f"llama-server -hf {NAME}:Q8_0 --jinja -c 4096" in body
    assert f"racdeploy pull {NAME} --out bundle" in body


def test_several_bundles_of_a_model_keep_each_others_files(
    run: Run, hub: Hub, tmp_path: Path
) -> None:
    """A second quant comes beside the first, and the card lists both."""
    run("push", make_fake_bundle(tmp_path / "a", files={"old.txt": b"1"}), NAME)
    first = _files(hub)
    run("push", make_fake_bundle(tmp_path / "b", "q4_0"), NAME)
    both = _files(hub)
    assert {path: both[path] for path in first if path != "README.md"} == {
        path: first[path] for path in first if path != "README.md"
    }
    assert "thinker-1B-rac-v1.0-Q4_0.gguf" in both
    body = _card(hub)[1]
    assert "| q8_0 |" in body
    assert "| q4_0 |" in body

    # Pushed again, a bundle takes its own place, and leaves nothing of the last push.
    run("push", make_fake_bundle(tmp_path / "c"), NAME)
    again = _files(hub)
    assert set(both) - set(again) == {f"{OWN}/old.txt"}
    assert again["thinker-1B-rac-v1.0-Q4_0.gguf"] == both["thinker-1B-rac-v1.0-Q4_0.gguf"]


def test_graphs_have_beside_them_what_programs_read(run: Run, hub: Hub, tmp_path: Path) -> None:
    """transformers.js looks for onnx/, config.json and tokenizer.json in one place."""
    done = run("push", make_fake_bundle(tmp_path / "a", "q4", "onnx"), NAME)
    assert done.exit_code == 0, done.output
    there = {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "config.json", "tokenizer.json"}
    assert there <= set(_files(hub))
    assert "racdeploy/onnx-q4/config.json" in _files(hub)

    # A second number format of the same model shares them.
    done = run("push", make_fake_bundle(tmp_path / "b", "q8", "onnx"), NAME)
    assert done.exit_code == 0, done.output

    # Pushed again without one, the first leaves it to the second.
    shutil.rmtree(tmp_path / "a")
    bundle = make_fake_bundle(tmp_path / "a", "q4", "onnx")
    (bundle / "config.json").unlink()
    assert run("push", bundle, NAME).exit_code == 0
    assert "racdeploy/onnx-q4/config.json" not in _files(hub)
    assert "config.json" in _files(hub)

    # A model that is cut otherwise has another config.json, which the first would not run with.
    before = _files(hub)
    other = make_fake_bundle(tmp_path / "c", "f16", "onnx", files={"config.json": b"{}"})
    done = run("push", other, NAME)
    assert done.exit_code == 2
    assert "another config.json, which belongs to bundle onnx-q" in done.stderr
    assert _files(hub) == before


def test_a_file_of_another_bundle_is_not_overwritten(run: Run, hub: Hub, tmp_path: Path) -> None:
    """Its manifest would no longer be true."""
    run("push", make_fake_bundle(tmp_path / "a"), NAME)
    files = _files(hub)
    renamed = {path.replace(OWN, "racdeploy/other"): content for path, content in files.items()}
    hub.repositories[NAME].commit(renamed)

    bundle = make_fake_bundle(tmp_path / "b")
    assert run("push", bundle, NAME).exit_code == 0  # the same bytes
    (bundle / "thinker-1B-rac-v1.0-Q8_0.gguf").write_bytes(b"others")
    manifest = json.loads((bundle / "racdeploy.json").read_text())
    sha256 = "b2c6d8b7a8ee1ac4b2be1b4ea7fa1dc8a0d3e9bd7e9a7f1cd0c3b5f2b2ff1f4e"
    manifest["artifacts"][0]["sha256"] = sha256
    (bundle / "racdeploy.json").write_text(json.dumps(manifest))
    assert run("push", bundle, NAME).exit_code == 2


def test_somebody_elses_card_stays(run: Run, hub: Hub, tmp_path: Path) -> None:
    """The bundle is pushed beside it, and its own card is in its folder."""
    repository = hub.repositories[NAME] = Repository()
    repository.commit({"README.md": b"mine", "notes.txt": b"mine"})
    done = run("push", make_fake_bundle(tmp_path / "b"), NAME)
    assert done.exit_code == 0
    assert "README.md of the repository was not written by racdeploy and is kept" in done.stderr
    assert (_files(hub)["README.md"], _files(hub)["notes.txt"]) == (b"mine", b"mine")
    assert f"{OWN}/README.md" in _files(hub)


def test_a_damaged_bundle_is_not_pushed(run: Run, hub: Hub, tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "b")
    (bundle / "tokenizer.json").write_bytes(b"{ }")
    done = run("push", bundle, NAME)
    assert (done.exit_code, hub.repositories) == (2, {})
    assert "tokenizer.json differs from its manifest" in done.stderr


def test_a_link_in_a_bundle_is_not_followed(run: Run, hub: Hub, tmp_path: Path) -> None:
    """A file of the user that somebody's bundle points at is not published."""
    (tmp_path / "secret").write_text("mine")
    bundle = make_fake_bundle(tmp_path / "b")
    (bundle / "notes.txt").symlink_to(tmp_path / "secret")
    run("push", bundle, NAME)
    assert b"mine" not in _files(hub).values()


def test_a_branch_is_written_and_the_main_one_stays(run: Run, hub: Hub, tmp_path: Path) -> None:
    done = run("push", make_fake_bundle(tmp_path / "b"), NAME, "--revision", "v2")
    assert done.exit_code == 0, done.output
    assert _files(hub, branch="main") == {}
    assert "README.md" in _files(hub, branch="v2")
    assert done.stdout.strip() == f"{hub.address}/{NAME}/tree/v2"


def test_json_says_what_was_written(run: Run, hub: Hub, tmp_path: Path) -> None:
    found = json.loads(run("push", make_fake_bundle(tmp_path / "b"), NAME, "--json").stdout)
    assert found["commit"].startswith(f"{hub.address}/{NAME}/commit/")
    assert {each["path"] for each in found["files"]} == set(_files(hub))


@pytest.mark.parametrize(
    ("token", "failure", "code", "said"),
    [
        ("", None, 4, "hf auth login"),
        ("hf_old", None, 4, "the Hub answers 401 for me/"),
        (READS, None, 2, "use another token"),
        ("", ("GET /api/models", (500, "")), 4, "the Hub answers 500"),
        ("hf_writes", ("/preupload/", (403, "storage limit")), 2, "storage limit"),
        ("hf_writes", ("/commit/", (429, "slow down")), 4, "try again later"),
    ],
)
def test_a_refusal_says_what_to_do(
    run: Run,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    failure: tuple[str, tuple[int, str]] | None,
    code: int,
    said: str,
) -> None:
    """Each in its own words, with the exit code of what is wrong."""
    monkeypatch.setenv("HF_TOKEN", token)
    hub.failures = dict([failure]) if failure else {}
    done = run("push", make_fake_bundle(tmp_path / "b"), NAME)
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("name", ["thinker", "me/", "me/a/b", "../a", "me/..", "https://x/y"])
def test_what_is_no_repository_is_refused(run: Run, hub: Hub, tmp_path: Path, name: str) -> None:
    done = run("push", make_fake_bundle(tmp_path / "b"), name)
    assert (done.exit_code, hub.asked) == (2, [])

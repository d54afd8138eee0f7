"""``racdeploy pull``: the bundle that was pushed, whole and checked, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bundles.hub.conftest import Run
from tests.support.commands import racdeploy_alone
from tests.support.fake_bundle import make_fake_bundle, read_files
from tests.support.hub_server import WRITES, Hub, Repository, point_at

NAME = "me/thinker-1B-RAC-GGUF"
MAIN = "thinker-1B-rac-v1.0-Q8_0.gguf"


@pytest.fixture
def pushed(run: Run, tmp_path: Path) -> Path:
    """A bundle that is in the repository too."""
    bundle = make_fake_bundle(tmp_path / "pushed")
    assert run("push", bundle, NAME).exit_code == 0
    return bundle


def _change(hub: Hub, path: str, content: bytes) -> None:
    repository = hub.repositories[NAME]
    repository.commit({**repository.files("main"), path: content})


def test_what_is_pulled_is_what_was_pushed(run: Run, pushed: Path, tmp_path: Path) -> None:
    """Byte for byte, under the repository's name, and the next command is said."""
    done = run("pull", NAME)
    assert done.exit_code == 0, done.output
    assert read_files(tmp_path / "thinker-1B-RAC-GGUF") == read_files(pushed)
    assert "racdeploy verify thinker-1B-RAC-GGUF" in done.stderr
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize(("quant", "form"), [("q4_0", "gguf"), ("q4", "onnx")])
def test_one_of_several_is_chosen(
    run: Run, pushed: Path, tmp_path: Path, quant: str, form: str
) -> None:
    """By its number format or its name; without a choice all are listed."""
    second = make_fake_bundle(tmp_path / "second", quant, form)
    assert run("push", second, NAME).exit_code == 0
    done = run("pull", NAME, "--out", "out")
    assert done.exit_code == 2
    assert "2 bundles" in done.stderr
    assert "thinker-1B-rac-v1.0-Q8_0 (q8_0)" in done.stderr

    assert run("pull", NAME, "--out", "out", "--quant", quant).exit_code == 0
    assert read_files(tmp_path / "out") == read_files(second)
    assert run("pull", NAME, "--out", "o", "--quant", MAIN.removesuffix(".gguf")).exit_code == 0
    assert run("pull", NAME, "--out", "other", "--quant", "q2_k").exit_code == 2


def test_an_earlier_commit_is_pulled(run: Run, hub: Hub, pushed: Path, tmp_path: Path) -> None:
    commit = hub.repositories[NAME].branches["main"]
    hub.repositories[NAME].commit({})
    assert run("pull", NAME, "--out", "now").exit_code == 2
    done = run("pull", NAME, "--revision", commit, "--out", "then", "--json")
    assert json.loads(done.stdout)["commit"] == commit
    assert read_files(tmp_path / "then") == read_files(pushed)


@pytest.mark.parametrize("path", [MAIN, f"racdeploy/{MAIN[:-5]}/tokenizer.json"])
def test_changed_bytes_are_refused(
    run: Run, hub: Hub, pushed: Path, tmp_path: Path, path: str
) -> None:
    """There is no bundle then; when the repository is repaired, the same command goes on."""
    right = hub.repositories[NAME].files("main")[path]
    _change(hub, path, right[:-1] + b"?")
    done = run("pull", NAME, "--out", "out")
    assert done.exit_code == 2
    assert f"{Path(path).name} differs from its manifest" in done.stderr
    assert "run the same command again" in done.stderr
    assert not (tmp_path / "out").exists()

    _change(hub, path, right)
    hub.asked.clear()
    assert run("pull", NAME, "--out", "out").exit_code == 0
    assert read_files(tmp_path / "out") == read_files(pushed)


def test_an_interrupted_pull_resumes(run: Run, hub: Hub, pushed: Path, tmp_path: Path) -> None:
    """What has arrived is not asked for again."""
    hub.failures = {"records.jsonl": (403, "")}
    assert run("pull", NAME, "--out", "out").exit_code == 2
    hub.failures = {}
    hub.asked.clear()
    assert run("pull", NAME, "--out", "out").exit_code == 0
    got = {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /me/")}
    assert "records.jsonl" in got
    assert "README.md" not in got
    assert read_files(tmp_path / "out") == read_files(pushed)


def test_an_artifact_that_is_not_there_is_named(run: Run, hub: Hub, pushed: Path) -> None:
    files = dict(hub.repositories[NAME].files("main"))
    del files[MAIN]
    hub.repositories[NAME].commit(files)
    done = run("pull", NAME, "--out", "out")
    assert (done.exit_code, f"lacks {MAIN!r}" in done.stderr) == (2, True)


def test_a_folder_that_exists_stays(run: Run, hub: Hub, pushed: Path, tmp_path: Path) -> None:
    """Also a link to an empty one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = read_files(pushed)
    for out in ("pushed", "link"):
        done = run("pull", NAME, "--out", out)
        assert (done.exit_code, "exists" in done.stderr) == (2, True)
    assert (read_files(pushed), list((tmp_path / "empty").iterdir())) == (before, [])


@pytest.mark.parametrize(
    ("name", "revision", "failure", "code", "said"),
    [
        ("me/nothing", "", {}, 2, "the Hub has no me/nothing"),
        (NAME, "nope", {}, 2, "Invalid rev id: nope"),
        (NAME, "", {"GET /api": (403, "blocked")}, 2, "blocked"),
        (NAME, "", {"GET /api": (503, "")}, 4, "try again later"),
        (NAME, "", {f"/{MAIN}": (404, "")}, 2, "the Hub has no"),
    ],
)
def test_a_refusal_says_what_to_do(
    run: Run,
    hub: Hub,
    pushed: Path,
    name: str,
    revision: str,
    failure: dict[str, tuple[int, str]],
    code: int,
    said: str,
) -> None:
    hub.failures = failure
    done = run("pull", name, "--out", "out", *(["--revision", revision] if revision else []))
    assert done.exit_code == code, done.output
    assert said in done.stderr


def test_a_gated_repository_says_where_to_ask(run: Run, hub: Hub, pushed: Path) -> None:
    hub.repositories[NAME].gated = True
    done = run("pull", NAME, "--out", "out")
    assert done.exit_code == 2
    assert f"ask for access at {hub.address}/{NAME}" in done.stderr


def test_a_private_repository_is_not_shown_to_strangers(
    run: Run, hub: Hub, pushed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", "")
    done = run("pull", NAME, "--out", "out")
    assert (done.exit_code, "hf auth login" in done.stderr) == (2, True)


def test_a_repository_without_bundles_says_how_to_get_its_files(run: Run, hub: Hub) -> None:
    """As most of the Hub's are."""
    repository = hub.repositories[NAME] = Repository()
    repository.commit({"model.gguf": b"GGUF"})
    done = run("pull", NAME, "--out", "out")
    assert done.exit_code == 2
    assert f"hf download {NAME}" in done.stderr


def test_without_a_network_it_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    done = run("pull", NAME, "--out", "out")
    assert done.exit_code == 4
    assert "the Hub at http://127.0.0.1:9 cannot be reached" in done.stderr


def test_the_command_line_takes_endpoint_and_token_as_the_client_does(
    hub: Hub, tmp_path: Path
) -> None:
    """Processes of their own, as a user starts them; the token is in no output."""
    bundle = make_fake_bundle(tmp_path / "pushed")
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": WRITES, "HF_HUB_OFFLINE": "0"}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    pushed = racdeploy_alone("push", bundle, NAME, cwd=tmp_path, **own, **home)
    pulled = racdeploy_alone("pull", NAME, "--out", "out", cwd=tmp_path, **own, **home)
    assert (pushed.code, pulled.code) == (0, 0), pushed.err + pulled.err
    assert read_files(tmp_path / "out") == read_files(bundle)
    assert WRITES not in pushed.out + pushed.err + pulled.out + pulled.err

    offline = racdeploy_alone(
        "pull", NAME, "--out", "o", cwd=tmp_path, **own | {"HF_HUB_OFFLINE": "1"}
    )
    assert (offline.code, "HF_HUB_OFFLINE" in offline.err) == (4, True)

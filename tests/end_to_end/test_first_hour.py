"""What a newcomer types in the first hour, and what has to be seen then; mistakes have a file of
their own.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from tests.support.commands import find_error_code
from tests.support.tiny_models import make_checkpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _type(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def test_the_first_lines_of_the_readme_fetch_the_project() -> None:
    """From the address that the package names, and with extras that exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    fetched = re.findall(r"(?:git clone |git\+)(https://\S+?)(?=[\s\"])", README)
    assert {address} == set(fetched)

    extras = re.findall(r'"?(?:racdeploy|\.)\[([\w,]+)\]', README)
    named = {extra for group in extras for extra in group.split(",")}
    assert "all" in named
    assert named <= set(project["optional-dependencies"])

    # A clone compiles llama.cpp for minutes where no wheel is looked for.
    (clone,) = re.findall(r'^pip install "\.\[all\]".*', README, re.MULTILINE)
    assert "--prefer-binary --extra-index-url" in clone


@pytest.mark.parametrize("name", ["CITATION.cff", "SECURITY.md", "CODE_OF_CONDUCT.md", "LICENSE"])
def test_a_file_that_people_look_for_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 500


def test_a_small_tier_finds_a_healthy_bundle_healthy(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes, with exit code 0, and says how little its prompts can show."""
    (tmp_path / "bundle").symlink_to(built)
    code, output = _type(
        "verify bundle --tier smoke --work work --threads 1", tmp_path, monkeypatch
    )
    assert code == 0, output
    assert output.endswith(
        "PASS with a widened margin: tiny-reasoner for ci-smoke, bytes 1.00 of dense q8_0"
    )
    assert "No breakage was found, which is all that 32 prompts can show" in output


def test_a_question_that_is_too_long_says_what_there_is_room_for(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").symlink_to(built)
    code, output = _type(f"run bundle '{'x ' * 2000}'", tmp_path, monkeypatch)
    assert (code, find_error_code(output)) == (2, "prompt-too-long"), output
    assert "1023" in output
    assert "the model supports 1,024 tokens" in output


def test_a_plan_promises_no_more_than_one_per_cent(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thoughts that were all as long as before."""
    (tmp_path / "bundle").symlink_to(built)
    code, output = _type("verify bundle --tier smoke --plan", tmp_path, monkeypatch)
    assert code == 0, output
    assert re.search(r"can show thinking that is more than [1-9]\d*% longer", output)


def test_an_exported_file_is_not_replaced_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is in the help, and a second export says so; a folder is not taken for a file."""
    make_checkpoint(tmp_path / "model", "qwen2")
    _, described = _type("export -h", tmp_path, monkeypatch)
    assert "MODEL-QUANT here" in described

    code, output = _type("export model", tmp_path, monkeypatch)
    assert code == 0, output
    assert "has been replaced" not in output
    _, output = _type("export model", tmp_path, monkeypatch)
    assert "model-q8_0.gguf existed and was replaced" in output

    code, output = _type("export model -o model", tmp_path, monkeypatch)
    assert (code, find_error_code(output)) == (2, "out-is-folder"), output
    assert "--out model/model.gguf" in output


def test_inspect_shows_what_its_help_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types, sizes, zeros, hashes and tensors, also of weights without a folder."""
    make_checkpoint(tmp_path / "model", "qwen2")
    _, described = _type("inspect -h", tmp_path, monkeypatch)
    assert "types, sizes, zeros and hashes of a file or folder, and all its tensors" in described
    assert "template" not in described

    for target in ("model", "model/model.safetensors"):
        code, output = _type(f"inspect {target}", tmp_path, monkeypatch)
        assert code == 0, output
        for part in ("bf16", "kB", "zeros_of_all_weights", "sha256", "model.norm.weight"):
            assert part in output

"""The Docker image: what it is made from is enough, and it runs where there is Docker."""

from __future__ import annotations

import shutil
import sys
import uuid
from pathlib import Path

import pytest

from tests.support.wheel import ROOT, run

NO_DOCKER = "" if shutil.which("docker") else "there is no docker on this machine"


def test_what_the_image_is_made_from_is_enough(tmp_path: Path) -> None:
    """The files that .dockerignore lets in make a wheel of the version that is named."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    for name in let_in:
        place = ROOT / name
        if place.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(place, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(place, tmp_path / name)

    done = run(
        *(sys.executable, "-m", "build", "--no-isolation", "--wheel", tmp_path),
        SETUPTOOLS_SCM_PRETEND_VERSION="1.2.3",
    )
    assert done.code == 0, done.out + done.err
    assert (tmp_path / "dist" / "racdeploy-1.2.3-py3-none-any.whl").is_file()


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_DOCKER), reason=NO_DOCKER)
def test_the_image_runs_as_a_user_without_rights(tmp_path: Path) -> None:
    """It writes and reads in the folder that is mounted: needs the network."""
    tag = f"racdeploy-test-{uuid.uuid4().hex[:8]}"
    built = run("docker", "build", "--tag", tag, ROOT)
    assert built.code == 0, built.err
    try:
        tmp_path.chmod(0o777)
        inside = ("docker", "run", "--rm", "--volume", f"{tmp_path}:/work")
        assert run(*inside, "--entrypoint", "id", tag, "-un").out.strip() == "racdeploy"
        assert run(*inside, tag, "export", "tiny-reasoner", "--out", "m.gguf").code == 0
        assert "zeros_of_all_weights" in run(*inside, tag, "inspect", "m.gguf", "--summary").out
    finally:
        run("docker", "image", "rm", tag)

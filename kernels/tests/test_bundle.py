"""A bundle on the sparse kernels: the same verdict, and the report says what ran."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kernels.tests.support.plugin import write_proof
from tests.end_to_end.conftest import built
from tests.support.commands import racdeploy

__all__ = ["built"]

pytestmark = pytest.mark.slow  # a bundle is built first


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a proof that uses the plug-in from 40 % zeros on."""
    folder = tmp_path_factory.mktemp("bundle") / "proofs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RACDEPLOY_ACCEL", str(folder))
        write_proof({"q8_0": 0.4})
    return folder


def test_verify_on_the_kernels_gives_the_same_verdict_and_says_so(
    built: Path, kernels: Path, tmp_path: Path
) -> None:
    """Every check passes; the dense answers came without the kernels, and the report names that."""
    arguments = ("verify", built, "--work", tmp_path, "--json")
    stock = racdeploy(*arguments, "--accel", "off")
    sparse = racdeploy(*arguments, "--accel", "require", RACDEPLOY_ACCEL=str(kernels))
    assert stock.code == sparse.code == 0, sparse.err
    before, after = json.loads(stock.out), json.loads(sparse.out)
    assert before["verdict"] == after["verdict"] == "pass"
    assert before["fingerprint"]["kernels"] == "the engine's own"
    (stock_ran,) = [
        note for note in before["notes"] if note.startswith("the pruned artifact ran on")
    ]
    assert stock_ran.endswith("ran on llama.cpp's own kernels: sparse ones are off")
    assert re.match(
        r"sparse (avx\w+|portable) \(llamacpp \w+\)",
        after["fingerprint"]["kernels"],
    )
    (ran,) = [
        note for note in after["notes"] if note.startswith("the pruned artifact ran on sparse")
    ]
    assert ran.endswith("matrices")
    assert [arm["kernels"] for arm in after["arms"]] == [
        before["arms"][0]["kernels"],
        ran.partition(" ran on ")[2],
    ]
    (other,) = [note for note in after["notes"] if "made under other conditions" in note]
    assert f"kernels the engine's own, now {after['fingerprint']['kernels']}" in other


def test_run_and_bench_use_the_kernels(built: Path, kernels: Path) -> None:
    """By themselves, where they are proven."""
    work = built.parent / "work"
    outcome = racdeploy(
        "run", built, "What is 12 times 34?", "--json", RACDEPLOY_ACCEL=str(kernels)
    )
    assert outcome.code == 0, outcome.err
    assert "kernels: sparse " in outcome.err
    bench = (
        "bench",
        built,
        "--work",
        work,
        "--rounds",
        1,
        "--prompt-tokens",
        16,
        "--new-tokens",
        4,
        "--json",
    )
    found = racdeploy(*bench, RACDEPLOY_ACCEL=str(kernels))
    assert found.code == 0, found.err
    assert json.loads(found.out)["kernels"].startswith("sparse ")

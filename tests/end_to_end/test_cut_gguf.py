"""One command: blocks of different widths, with optimized codes, packed."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

import racdeploy as package
from racdeploy.manifest import Manifest
from tests.support.commands import racdeploy

pytestmark = pytest.mark.slow
KEPT = ("--keep", "ffn=0.75", "--keep", "heads=0.75")
ASKED = ("--tasks", "gcd", "--trace-prompts", 32, "--prompts", 8, "--sparsity", 0.5)
STORED = ("--quant", "q4_0", "--packing", "bitmask", "--set", 'export.rounding="optimized"')


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, cut on so few traces that it answers what it will."""
    folder = tmp_path_factory.mktemp("cut")
    outcome = racdeploy(
        *("build", "tiny-reasoner", "--target", "gguf", *ASKED, *KEPT, *STORED),
        *("--work", folder / "work", "--out", folder / "bundle", "--threads", 1),
    )
    assert outcome.code in (1, 3), outcome.err
    return folder / "bundle"


def test_the_report_explains_the_file(bundle: Path) -> None:
    """It holds what pruning left: the zeros, the codes that it chose, and torch's logits."""
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    checks = {check["name"]: check["verdict"] for check in report["checks"]}
    names = ("integrity", "logits", "sparsity", "template", "tokens")
    assert {name: checks[name] for name in names} == dict.fromkeys(names, "pass")
    (other,) = report["deviations"]
    assert (other["subject"], other["actual"]) == ("architecture", "openelm")

    joined = [row for row in report["tensors"] if row["name"].endswith("attn_qkv.weight")]
    assert len(joined) == 4
    assert {(row["actual_quant"], row["packing"]) for row in joined} == {("q4_0", "bitmask")}
    assert all(0.4 < row["zeros"] < 0.8 for row in joined)


def test_a_later_verification_finds_the_same_linears(bundle: Path, tmp_path: Path) -> None:
    """A bundle knows its tensors by their names in the file, q, k and v in one among them."""
    outcome = racdeploy("verify", bundle, "--json", "--work", tmp_path / "work", "--threads", 1)
    assert outcome.code in (0, 1, 3), outcome.err
    found = {check["name"]: check for check in json.loads(outcome.out)["checks"]}
    assert found["sparsity"]["verdict"] == "pass"
    assert found["sparsity"]["figures"]["tensors"] == 4 * 5


def test_apps_and_other_programs_open_it(bundle: Path, tmp_path: Path) -> None:
    with package.load(bundle, threads=1) as model:
        assert model.generate("What is 12 times 34?", temperature=0).thinking_tokens

    packed = bundle / Manifest.read(bundle).artifacts[0].path
    outcome = racdeploy("unpack", packed, "--out", tmp_path / "plain.gguf")
    assert outcome.code == 0, outcome.err
    fields = gguf.GGUFReader(tmp_path / "plain.gguf").fields
    assert len(set(fields["openelm.feed_forward_length"].contents())) > 1

"""The plug-in for llama.cpp takes the linears of every family, and the answers stay the same.

Tiny random models, half of each linear zero: without a pattern in every other block, 2:4 in the
rest. One process runs all files as they are, and one with the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kernels.tests.support.plugin import write_proof
from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize_expert
from racdeploy.models.family_support import describe_families
from racdeploy.pruning.walk.assemble import assemble
from tests.support.tiny_models import FAMILIES, make_checkpoint

pytestmark = pytest.mark.slow
QUANTS = ("q8_0", "q4_0")
ROWS = {row.family: row for row in reversed(describe_families())}  # without experts first
_CHILD = """
import sys

import llama_cpp
import numpy as np

from pathlib import Path
from racdeploy import sparse_kernels

out, mode, *files = sys.argv[1:]
ids = [5, 90, 17, 300, *range(100, 132)]
for file in files:
    status = sparse_kernels.enable(Path(file), mode, threads=1)
    options = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    model = llama_cpp.Llama(file, logits_all=True, use_mmap=False, **options)

    model.eval(ids[:20])  # a batch, then one by one: the kernels have a way for each
    for token in ids[20:]:
        model.eval([token])

    assert mode == "off" or status.count_packed() == len(status.tensors)
    name = file.rpartition("/")[2]
    np.savez(f"{out}/{name}.npz", logits_TV=model.scores[: len(ids)], taken=status.tensors)
    model.close()
"""


@dataclass(frozen=True)
class Ran:
    """What llama.cpp made of the files of one family, and how."""

    folder: Path
    sources: dict[str, str]

    def logits(self, mode: str, quant: str) -> np.ndarray:
        with np.load(self.folder.parent / mode / f"{self.folder.name}-{quant}.gguf.npz") as arrays:
            return np.array(arrays["logits_TV"])

    def taken(self, quant: str) -> set[str]:
        """Return the linears of the checkpoint whose matrices went to the plug-in."""
        file = self.folder.parent / "require" / f"{self.folder.name}-{quant}.gguf.npz"
        with np.load(file) as arrays:
            return {self.sources[str(name)] for name in arrays["taken"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Every family's files, run with and without the kernels."""
    root = tmp_path_factory.mktemp("families")
    ran = {family: _write(root, family) for family in FAMILIES}
    files = [str(root / f"{family}-{quant}.gguf") for family in FAMILIES for quant in QUANTS]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RACDEPLOY_ACCEL", str(root / "proofs"))
        write_proof({f"{quant}{kind}": 0.3 for quant in QUANTS for kind in ("", " 2:4")})
    for mode in ("off", "require"):
        (root / mode).mkdir()
        subprocess.run(
            [sys.executable, "-c", _CHILD, str(root / mode), mode, *files],
            check=True,
            env=os.environ | {"RACDEPLOY_ACCEL": str(root / "proofs")},
        )
    return ran


def _write(root: Path, family: str) -> Ran:
    """Write a model in both number formats."""
    folder = make_checkpoint(root / family / "model", family, dtype="float32")
    checkpoint = _spare_half(Checkpoint(folder), root / family)
    sources: dict[str, str] = {}
    for quant in QUANTS:
        for tensor in gguf.export(checkpoint, root / f"{family}-{quant}.gguf", quant=quant).tensors:
            inside = checkpoint.family.split_block(tensor.source)[1]
            sources[tensor.name] = generalize_expert(inside).removesuffix(".weight")
    return Ran(root / family, sources)


def _spare_half(checkpoint: Checkpoint, root: Path) -> Checkpoint:
    """Set the smaller half of every linear to zero, in odd blocks of each four weights."""
    weights = {}
    for block in range(checkpoint.block_count):
        for linear in checkpoint.linears(block):
            name = f"{checkpoint.family.blocks}.{block}.{linear}.weight"
            weight_OI = weights[name] = checkpoint.read(name).copy()
            of = 4 if block % 2 else weight_OI.size
            group_XS = weight_OI.reshape(-1, of)
            smaller_XS = np.abs(group_XS).argpartition(of // 2, axis=1)[:, : of // 2]
            np.put_along_axis(group_XS, smaller_XS, 0, 1)

    (root / "blocks").mkdir()
    save_file(weights, root / "blocks" / "block-00000.safetensors")
    return Checkpoint(assemble(checkpoint, root / "blocks", root / "sparse"))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_go_to_the_kernels(root: dict[str, Ran], family: str, quant: str) -> None:
    """All that `racdeploy families` says, of every kind of block, and nothing else."""
    assert root[family].taken(quant) == set(ROWS[family].kernels)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_stock_engine(
    root: dict[str, Ran], family: str, quant: str
) -> None:
    """Both multiply the same 8-bit activations, and add in another order.

    Where a last bit moves an activation by a step of 1/127 of the largest of 32, which is 2.5 times
    the usual one, an output of 64 inputs moves by 2.5 / 127 / sqrt(64) of its size: a quarter
    percent. Eight such steps are allowed for; the other number format is further away.
    """
    stock_TV, sparse_TV = (root[family].logits(mode, quant) for mode in ("off", "require"))
    allowed = 0.02 * np.abs(stock_TV).max()
    assert np.abs(sparse_TV - stock_TV).max() <= allowed

    (other,) = set(QUANTS) - {quant}
    assert np.abs(root[family].logits("require", other) - stock_TV).max() > allowed

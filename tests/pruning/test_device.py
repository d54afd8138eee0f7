"""Pruning on a device: what goes there, what comes back, and that nothing is mixed up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from racdeploy import plugins
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning import block_pruning, device
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.device import choose_device
from racdeploy.recipe import Pruning, Structure
from racdeploy.traces.trace import Trace
from tests.support.errors import raises
from tests.support.far_device import FAR, far_device
from tests.support.more import some
from tests.support.tiny_models import FAMILIES, make_checkpoint

pytestmark = pytest.mark.more

SETTINGS = [
    *({"method": name} for name in plugins.list_names("prune_methods")),
    {"allocation": "error", "method": "wanda", "refit_steps": 0},
    {"pattern": "2:4"},
]

ALONE = {"target": "linear_output", "refit_steps": 0}
# Share of a linear's weights that may be zero on one device alone, and relative distance of the
# drift; masks that have nothing in common differ in 50 %. Noise of 2e-6 on every product and sum of
# the stand-in moves no weight, 0.7, 5.4 and 4.8 %, and the drift by up to 0, 0.2, 1.1 and 0.7 %: a
# model this small makes ill-conditioned systems. Noise of 1e-3, as of TF32, is too much for
# sparsegpt and wanda.
ON_A_GPU = [
    *(({"method": name, **ALONE}, 0.002, 0.001) for name in ("magnitude", "wanda")),
    ({"method": "sparsegpt", **ALONE}, 0.03, 0.01),
    ({"method": "admm", **ALONE}, 0.2, 0.1),
    ({"damping": 0.1}, 0.2, 0.1),
]


def _trace(index: int) -> Trace:
    ids = torch.randint(
        0, 480, (24 + index,), generator=torch.Generator().manual_seed(index)
    ).tolist()
    return Trace(
        index, "gcd", f"q{index}", "1", tuple(ids[:6]), tuple(ids[6:]), 12, 12, False, True
    )


TRACES = [_trace(index) for index in range(8)]


def _prune(
    checkpoint: Checkpoint,
    settings: Pruning,
    folder: Path,
    keep: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, str]:
    """Return what the walk leaves and says, with the one attention kernel that every device has."""
    folder.mkdir(exist_ok=True)
    quant = "q8_0" if settings.n_m else ""
    with sdpa_kernel(SDPBackend.MATH):
        rows = prune_blocks(
            checkpoint,
            TRACES[2:],
            TRACES[:2],
            settings,
            folder,
            quant=quant,
            structure=Structure(keep=dict(keep)),
        )
    files = {file.name: file_sha256(file) for file in folder.iterdir()}
    assert any(name.startswith("block-") for name in files)
    return files | {"rows": repr(rows)}


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (block_pruning, device):
        monkeypatch.setattr(
            module, "choose_device", lambda asked: FAR if asked == "cuda" else device.CPU
        )


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_device_of_its_own_prunes_alike(settings: dict[str, object], tmp_path: Path) -> None:
    """Byte for byte, on a device that computes as the CPU does and refuses to be mixed with it."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen2", dtype="float32"))
    expected = _prune(checkpoint, Pruning(device="cpu", **settings), tmp_path / "cpu")
    with far_device():
        assert expected == _prune(checkpoint, Pruning(device="cuda", **settings), tmp_path / "far")


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("family", some(FAMILIES))
def test_every_family_runs_on_a_device(family: str, tmp_path: Path) -> None:
    """With its rotary embeddings and its masks."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", family, dtype="float32"))
    simple = {"method": "magnitude", "target": "dense_output"}
    expected = _prune(checkpoint, Pruning(device="cpu", **simple), tmp_path / "cpu")
    with far_device():
        assert expected == _prune(checkpoint, Pruning(device="cuda", **simple), tmp_path / "far")


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize(
    "keep", [{"ffn": 0.5, "heads": 0.75, "blocks": 0.5}, {"kv_groups": 0.5}], ids=str
)
def test_cuts_are_made_on_a_device(keep: dict[str, float], tmp_path: Path) -> None:
    """The survey, the choice of blocks, and the removal."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 128}
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen2", dtype="float32", **sizes))
    found = {}
    for name, asked in (("cpu", "cpu"), ("far", "cuda")):
        with far_device():
            settings = Pruning(sparsity=0.3, device=asked)
            found[name] = _prune(checkpoint, settings, tmp_path / name, keep)
    assert found["cpu"] == found["far"]


@pytest.mark.usefixtures("far")
def test_a_step_goes_on_there_after_an_interruption(tmp_path: Path) -> None:
    """Blocks that are finished go to the device too."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "llama", dtype="float32"))
    expected = _prune(checkpoint, Pruning(device="cpu"), tmp_path / "cpu")
    with far_device():
        _prune(checkpoint, Pruning(device="cuda"), tmp_path / "far")
        for file in (tmp_path / "far").glob("*-00001.*"):
            file.unlink()
        assert expected == _prune(checkpoint, Pruning(device="cuda"), tmp_path / "far")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize(("settings", "moved", "error"), ON_A_GPU, ids=str)
def test_a_gpu_prunes_as_the_cpu_does(
    settings: dict[str, object], moved: float, error: float, tmp_path: Path
) -> None:
    """Sums in another order turn few weights on or off, and leave the held-out error as it was."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen2", dtype="float32"))
    masks, drifts = [], []
    for where in ("cpu", "cuda"):
        (folder := tmp_path / where).mkdir()
        with sdpa_kernel(SDPBackend.MATH):
            _, blocks = prune_blocks(
                checkpoint, TRACES[2:], TRACES[:2], Pruning(device=where, **settings), folder
            )
        files = sorted(folder.glob("block-*.safetensors"))
        masks.append(
            {name: value == 0 for file in files for name, value in load_file(file).items()}
        )
        drifts.append([block.drift for block in blocks])
    assert len(masks[0]) == 14
    found = {
        name: float((zero_OI != masks[1][name]).float().mean())
        for name, zero_OI in masks[0].items()
    }
    assert max(found.values()) <= moved, found
    assert drifts[0] == pytest.approx(drifts[1], rel=error)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of one machine take its GPUs in turn; without one, ``auto`` is the CPU and ``cuda``
    an error.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with raises("no-gpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda", 1)


def test_the_far_device_refuses_to_be_mixed() -> None:
    """The check that the other tests stand on."""
    with far_device(), pytest.raises(RuntimeError, match="and on the cpu"):
        torch.ones(3).to(FAR) + torch.ones(3)

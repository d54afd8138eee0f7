"""What every method to recover promises: nearer to the dense model, zeros and cuts as they were."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from racdeploy import plugins, recovery
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Structure
from racdeploy.recovery import cost
from racdeploy.recovery.training_run import TrainingRun
from tests.support.fork_server import fork_context
from tests.support.tiny_training_run import make_training_run, read_weights

ALL = plugins.list_names("recover_methods")
FEW = 1000  # tokens: ten steps, where more would show nothing else


@pytest.fixture(params=ALL)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def recovered(training_run: TrainingRun, method: str) -> dict[str, torch.Tensor]:
    """Recover a model and return its tensors."""
    recovery.load(method).recover(training_run)
    training_run.write()
    return read_weights(training_run.out)


def test_it_comes_nearer_to_the_dense_model(tmp_path: Path, method: str) -> None:
    """The first look is the start, and the best later one is nearer, on traces it did not see."""
    first, *later = recovery.load(method).recover(make_training_run(tmp_path))
    assert first.tokens == 0
    assert first.kl_nats is not None
    found = [look.kl_nats for look in later]
    assert min(kl for kl in found if kl is not None) < 0.995 * first.kl_nats
    assert later[-1].tokens >= 3000


def test_zeros_stay_zeros(tmp_path: Path, method: str) -> None:
    """Every zero of a pruned linear is there, to the last bit, and something else has moved."""
    training_run = make_training_run(tmp_path, tokens=FEW)
    before, after = read_weights(training_run.sparse.folder), recovered(training_run, method)
    assert before.keys() == after.keys()
    for name in training_run.masked_weights:
        assert not after[name][before[name] == 0].any()
        assert int((before[name] == 0).sum()) > 0
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_is_not_in_blocks_stays(tmp_path: Path, method: str) -> None:
    """Embedding and output projection are the pruned model's, byte for byte."""
    training_run = make_training_run(tmp_path, tokens=FEW, tie_word_embeddings=False)
    before, after = read_weights(training_run.sparse.folder), recovered(training_run, method)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])


def test_cuts_stay_cut(tmp_path: Path, method: str) -> None:
    """A model that lost a block, and channels of others, keeps its widths."""
    cut = Structure(keep={"ffn": 0.5, "blocks": 0.75})
    training_run = make_training_run(tmp_path, structure=cut, num_hidden_layers=4)
    assert len(training_run.sources) == 3

    first, *later = recovery.load(method).recover(training_run)
    found = [look.kl_nats for look in later if look.kl_nats is not None]
    assert first.kl_nats is not None
    assert min(found) < first.kl_nats

    training_run.write()
    model = Checkpoint(training_run.out)
    for setting in ("intermediate_size", "num_attention_heads"):
        assert model.shape.widths[setting] == training_run.sparse.shape.widths[setting]


def test_it_repeats(tmp_path: Path, method: str) -> None:
    """Twice the same training run is twice the same bytes; another seed gives others."""
    twins = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        twins.append(recovered(make_training_run(tmp_path / name, tokens=FEW), method))
    assert all(torch.equal(twins[0][name], twins[1][name]) for name in twins[0])

    (tmp_path / "c").mkdir()
    other = recovered(make_training_run(tmp_path / "c", tokens=FEW, settings={"seed": 1}), method)
    assert any(not torch.equal(twins[0][name], other[name]) for name in other)


def test_killed_it_resumes(tmp_path: Path, method: str) -> None:
    """Killed after half of the tokens, it ends with the bytes of one that was not."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()

    expected = recovered(make_training_run(tmp_path / "whole", tokens=FEW), method)
    training_run = make_training_run(tmp_path / "killed", tokens=FEW)

    victim = fork_context().Process(target=_recover_and_die, args=(training_run, method))
    victim.start()
    victim.join(120)
    assert victim.exitcode == -signal.SIGKILL

    found = recovered(training_run, method)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_it_says_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Memory that is more for a wider model, where the logits do not take more than all else."""
    monkeypatch.setattr(cost, "_HEAD_BYTES", 0)
    small = recovery.load(method).peak_bytes(make_training_run(tmp_path))
    (tmp_path / "large").mkdir()
    wide = make_training_run(tmp_path / "large", intermediate_size=1024)
    assert 0 < small < recovery.load(method).peak_bytes(wide)


def _recover_and_die(training_run: TrainingRun, method: str) -> None:
    def die(label: str, done: int, total: int, tokens: int = 0) -> None:
        if done >= total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    recovery.load(method).recover(replace(training_run, progress=die))

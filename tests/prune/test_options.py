"""Options of a survey: what each costs is what whole-model forward passes show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from racdeploy import quant
from racdeploy.engines.transformers.torch_model import load_model
from racdeploy.errors import RacdeployError, UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.options import spread, survey_options
from racdeploy.prune.surveyed import Option, Surveyed
from racdeploy.recipe import Pruning, StreamWeights
from racdeploy.traces.trace import Trace
from tests.support.block_outputs import take_states
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES, make_trace

SETTINGS = Pruning()
WEIGHTS = StreamWeights(prompt=0.5, thinking=2.0, answer=1.0)
LINEARS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a model of two blocks and tied embeddings."""
    folder = tmp_path_factory.mktemp("options") / "model"
    return Checkpoint(make_checkpoint(folder, "qwen3", dtype="float32"))


@pytest.fixture(scope="module")
def surveyed(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Surveyed:
    """Return what a survey finds of a single format, whose errors are measured and not scaled."""
    folder = tmp_path_factory.mktemp("walk")
    return survey_options(checkpoint, TRACES, SETTINGS, ("q4_0",), folder, weights=WEIGHTS)


def _share(
    dense: Sequence[torch.Tensor], changed: Sequence[torch.Tensor], *, centred: bool = False
) -> float:
    """Return |change|² / |output|², the mean over the tokens of all traces as they count."""
    lost = counted = 0.0
    weights_R = torch.tensor([WEIGHTS.prompt, WEIGHTS.thinking, WEIGHTS.answer])
    for trace, dense_TX, changed_TX in zip(TRACES, dense, changed, strict=True):
        change_TX = changed_TX - dense_TX
        if centred:
            change_TX = change_TX - change_TX.mean(1, keepdim=True)
            dense_TX = dense_TX - dense_TX.mean(1, keepdim=True)
        share_T = change_TX.square().sum(1) / dense_TX.square().sum(1)
        weight_T = weights_R[trace.streams()]
        lost, counted = lost + float(share_T @ weight_T), counted + float(weight_T.sum())
    return lost / counted


@contextmanager
def _watch(module: nn.Module, *, given: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collect what a module makes of each trace, or is given."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: Any) -> None:
        seen.append((arguments[0] if given else take_states(output))[0].clone())

    handle = module.register_forward_hook(keep)
    yield seen
    handle.remove()


def _run(model: nn.Module) -> None:
    for trace in TRACES:
        model(input_ids=torch.tensor([trace.ids]))


def _round(weight_OI: torch.Tensor, importance_I: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return what a GGUF file would hold."""
    form = quant.load_ggml(name)
    known_I = None if importance_I is None else importance_I.numpy()
    packed_OP = form.quantize(weight_OI.numpy(), known_I)
    return torch.from_numpy(form.dequantize(packed_OP, weight_OI.shape[1]))


@pytest.mark.parametrize("linear", LINEARS)
@torch.inference_mode()
def test_an_error_is_that_of_the_exported_weights_in_the_whole_model(
    linear: str, checkpoint: Checkpoint, surveyed: Surveyed
) -> None:
    """Rounded by the importance of its inputs, as exported; rounded without it, it would differ."""
    model = load_model(checkpoint)
    name = f"model.layers.1.{linear}"
    module, block = model.get_submodule(name), model.get_submodule("model.layers.1")
    with _watch(module, given=True) as inputs, _watch(block) as dense:
        _run(model)

    weights_R = torch.tensor([WEIGHTS.prompt, WEIGHTS.thinking, WEIGHTS.answer])
    weight_N = torch.cat([weights_R[trace.streams()] for trace in TRACES])
    mean_I = weight_N @ torch.cat(inputs).square() / weight_N.sum()
    weight_OI = module.weight.data.clone()

    shares = []
    for importance_I in (mean_I / mean_I.mean(), None):
        module.weight.data = _round(weight_OI, importance_I, "q4_0")
        with _watch(block) as changed:
            _run(model)
        shares.append(_share(dense, changed))

    found = surveyed.linears[name]["q4_0"].error
    assert found == pytest.approx(shares[0], rel=1e-3)
    assert found != pytest.approx(shares[1], rel=3e-3), "the importance must show"


@torch.inference_mode()
def test_ends_are_those_of_the_whole_model(checkpoint: Checkpoint, surveyed: Surveyed) -> None:
    """The embedding at the first block's end, the head at the logits, each rounded alone."""
    model = load_model(checkpoint)
    embedding = model.get_input_embeddings()
    block, norm = model.get_submodule("model.layers.0"), model.get_submodule("model.norm")
    with _watch(block) as dense, _watch(norm) as hidden:
        _run(model)

    weight_VD = embedding.weight.data.clone()
    stored_VD = _round(weight_VD, None, "q4_0")
    embedding.weight.data = stored_VD
    with _watch(block) as changed:
        _run(model)
    assert surveyed.embedding["q4_0"].error == pytest.approx(_share(dense, changed), rel=1e-3)

    logits = [[hidden_TD @ each_VD.T for hidden_TD in hidden] for each_VD in (weight_VD, stored_VD)]
    assert surveyed.head["q4_0"].error == pytest.approx(_share(*logits, centred=True), rel=1e-3)


def test_options_are_ranked_as_they_are(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """More bits, fewer zeros and chosen codes lose less; zeros are counted; what cannot be stored
    in rows of 64 weights is left out.
    """
    options = ("q8_0", "q5_0", "q4_0", "q4_0+joint", "q4_0@0.5", "q4_0@2:4", "q8_0@1:5", "q4_k")
    folder = tmp_path
    found = survey_options(checkpoint, TRACES, SETTINGS, options, folder, parts=("ffn",))
    total = {key: found.total(key) for key in options}
    order = ("q8_0", "q5_0", "q4_0+joint", "q4_0", "q4_0@0.5", "q4_0@2:4")
    assert sorted(order, key=total.__getitem__) == list(order)
    assert total["q4_k"] == 0, "no row of this model divides into blocks of 256"
    for stored in found.linears.values():
        assert stored.keys() == {*order}, "rows of 64 do not divide by five"
        assert stored["q4_0@0.5"].zeros >= 0.5 > stored["q8_0"].zeros

    (first, second) = found.widths["ffn"]
    assert min(first) == 32
    assert first[max(first)] == 0 < second[min(second)]
    assert Surveyed.read(found.as_json()) == found


def test_experts_are_surveyed_one_by_one(tmp_path: Path) -> None:
    """A mixture's experts have errors of their own, which a file's tensor adds up."""
    moe = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe", dtype="float32"))
    found = survey_options(moe, TRACES, SETTINGS, ("q8_0", "q4_0"), tmp_path)
    experts = [name for name in found.linears if ".experts." in name]
    assert len(experts) == 3 * moe.experts * moe.block_count
    assert all(found.linears[name]["q8_0"].error < 1e-2 for name in experts)


def test_tokens_are_spread_over_all_traces() -> None:
    """Whole traces from first to last, and one at least."""
    traces = [make_trace(index, 4, 4, 2) for index in range(40)]
    chosen = spread(traces, 100)
    assert [trace.index for trace in chosen] == [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]
    assert spread(traces, 0) == traces
    assert [trace.index for trace in spread(traces, 3)] == [0]


def test_without_traces_nothing_is_tried(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Said before the model is read."""
    empty: list[Trace] = []
    with pytest.raises(UsageError, match="no calibration traces"):
        survey_options(checkpoint, empty, SETTINGS, ("q4_0",), tmp_path)


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("q4_0", Option("q4_0")),
        ("q4_0@0.5", Option("q4_0", 0.5)),
        ("q8_0@2:4", Option("q8_0", 0.5, "2:4")),
        ("q3_k@0.7+joint", Option("q3_k", 0.7, "", joint=True)),
    ],
)
def test_a_key_names_an_option(key: str, option: Option) -> None:
    """There and back."""
    assert Option.parse(key) == option
    assert option.key == key


@pytest.mark.parametrize("key", ["q9_9", "q4_0@1", "q4_0@0.5:4", "q4_0@4:0", "q4_0 0.5", "@0.5"])
def test_another_key_is_refused(key: str) -> None:
    """A number format that is not there, no share, no pattern."""
    with pytest.raises(RacdeployError):
        Option.parse(key)


def test_numbers_are_finite(surveyed: Surveyed) -> None:
    """Every linear has its error, and a share of zeros."""
    values = [each["q4_0"] for each in surveyed.linears.values()]
    assert all(np.isfinite(stored.error) and 0 < stored.error < 1 for stored in values)

"""Cuts of structure in the walk, against whole-model forward passes of transformers."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.device import CPU
from racdeploy.pruning.job_share import WHOLE_SHARE
from racdeploy.pruning.structure.cut import CutContext
from racdeploy.pruning.structure.cut_plan import list_structure_rows, read_cut_plan
from racdeploy.pruning.structure.decision import allocate_units
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.walk.assemble import CutShape, assemble
from racdeploy.pruning.walk.batches import make_batches
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import InputStatistic
from racdeploy.pruning.walk.work_share import WorkShare
from racdeploy.recipe import Pruning, Structure
from racdeploy.results.pruning import BlockRow, LinearRow
from racdeploy.traces.trace import Trace
from tests.support.errors import raises
from tests.support.more import some
from tests.support.tiny_models import CUT_FAMILIES, make_checkpoint
from tests.support.tiny_traces import TRACES, make_trace

PLAIN = Pruning(sparsity=0.0)
HELD_OUT = [make_trace(30 + i, 6, 12, 3) for i in range(3)]
NUMBERED = (
    "exaone4",
    "gemma3_text",
    "smollm3",
)  # engines tell from a block's number how it attends


def _cut(
    checkpoint: Checkpoint,
    folder: Path,
    keep: Mapping[str, float],
    settings: Pruning = PLAIN,
    **given: Any,
) -> tuple[Checkpoint, list[LinearRow], list[BlockRow]]:
    """Cut and prune, and return the model as it is read back."""
    structure = Structure(keep=dict(keep), **given.pop("structure", {}))
    blocks = folder / "blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    rows = prune_blocks(
        checkpoint, TRACES, HELD_OUT, settings, blocks, structure=structure, **given
    )
    shape = read_cut_plan(blocks).shape(checkpoint.shape, structure)
    return Checkpoint(assemble(checkpoint, blocks, folder / "model", shape)), *rows


def _make(tmp_path: Path, family: str = "qwen3", **config: Any) -> Checkpoint:
    config = {"num_hidden_layers": 4, "intermediate_size": 128} | config
    if family == "gemma3_text":
        config.pop("num_hidden_layers")
    return Checkpoint(make_checkpoint(tmp_path / "dense", family, dtype="float32", **config))


def _block_outputs(model: nn.Module, trace: Trace) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []

    def remember(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[-len(trace.ids) :])

    layers: Any = model.get_submodule("model.layers")
    handles = [layer.register_forward_hook(remember) for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.tensor([trace.ids]))
    for handle in handles:
        handle.remove()
    return [output.reshape(len(trace.ids), -1) for output in seen]


def _drifts(dense: Checkpoint, cut: Checkpoint, sources: tuple[int, ...]) -> list[float]:
    """Return the relative change after each block of the cut model, over the held-out traces."""
    models = load_model(dense), load_model(cut)
    lost, energy = [0.0] * len(sources), [0.0] * len(sources)
    for trace in HELD_OUT:
        wanted, found = (_block_outputs(model, trace) for model in models)
        for place, source in enumerate(sources):
            lost[place] += float((found[place] - wanted[source]).square().sum())
            energy[place] += float(wanted[source].square().sum())
    return [a / b for a, b in zip(lost, energy, strict=True)]


@pytest.mark.parametrize("family", some(CUT_FAMILIES))
def test_the_drift_of_a_cut_model_is_that_of_a_whole_forward_pass(
    tmp_path: Path, family: str
) -> None:
    """Every family, widths that differ per block: what the walk saw is what the folder computes."""
    dense = _make(tmp_path, family, hidden_size=128, head_dim=32)
    settings = Pruning(sparsity=0.3, pattern="unstructured")
    cut, linears, blocks = _cut(dense, tmp_path, {"ffn": 0.5, "heads": 0.75}, settings)

    sources = tuple(range(dense.shape.block_count))
    expected = _drifts(dense, cut, sources)
    assert [row.drift for row in blocks] == pytest.approx(expected, rel=1e-3)

    widths = cut.shape.widths["intermediate_size"]
    assert sum(widths) == sum(dense.shape.widths["intermediate_size"]) / 2
    assert sum(cut.shape.widths["num_attention_heads"]) == pytest.approx(
        0.75 * sum(dense.shape.widths["num_attention_heads"]), abs=1
    )
    assert {round(row.actual_sparsity, 2) for row in linears} == {0.3}
    assert all(row.held_out_error is not None for row in linears)


@pytest.mark.parametrize("family", some(f for f in CUT_FAMILIES if f not in NUMBERED))
def test_a_model_without_blocks_is_what_the_walk_saw(tmp_path: Path, family: str) -> None:
    """Blocks are renumbered, in the rows too; the dense model still passes those that are gone."""
    dense = _make(tmp_path, family)
    cut, linears, blocks = _cut(dense, tmp_path, {"blocks": 0.5, "ffn": 0.5})

    sources = read_cut_plan(tmp_path / "blocks").blocks
    assert len(sources) == cut.shape.block_count == 2
    assert [row.block for row in blocks] == [0, 1]
    assert {row.name.split(".")[2] for row in linears} == {"0", "1"}
    assert [row.drift for row in blocks] == pytest.approx(_drifts(dense, cut, sources), rel=1e-3)
    rows = list_structure_rows(dense.shape, CutShape(sources, cut.shape.sizes))
    assert [row.source_block for row in rows] == list(sources)


@pytest.mark.parametrize("count", [3, 2])
def test_blocks_go_by_the_drift_that_their_removal_leaves(tmp_path: Path, count: int) -> None:
    """One after the other; each candidate's last hidden states are a whole forward pass's."""
    dense = _make(tmp_path)
    batches = make_batches(TRACES, ["gcd"], held_out=False)
    session = PruningSession(BlockwiseModel(dense), batches, batches, PLAIN, tmp_path)
    with torch.inference_mode():
        context = CutContext(session, plugins.load("criteria", "error"), count)
        chosen = plugins.load("structures", "blocks").cut(context)

    model: Any = load_model(dense)
    wanted = {trace.index: _block_outputs(model, trace)[-1] for trace in TRACES}
    layers = list(model.model.layers)
    left = list(range(4))
    while len(left) > count:
        changes = {}
        for candidate in left:
            model.model.layers = nn.ModuleList(layers[i] for i in left if i != candidate)
            shares = []
            for trace in TRACES:
                found_TD, wanted_TD = _block_outputs(model, trace)[-1], wanted[trace.index]
                change_T = (found_TD - wanted_TD).square().sum(-1)
                shares.append(change_T / wanted_TD.square().sum(-1))
            changes[candidate] = float(torch.cat(shares).mean())
        left.remove(min(left, key=changes.__getitem__))

    assert chosen == left


def test_a_share_of_one_changes_nothing(tmp_path: Path) -> None:
    """Byte for byte what no structure gives."""
    dense = _make(tmp_path)
    settings = Pruning(sparsity=0.5)
    plain, *_ = _cut(dense, tmp_path / "plain", {}, settings)
    whole, *_ = _cut(dense, tmp_path / "whole", {"ffn": 1.0, "heads": 1.0, "blocks": 1.0}, settings)
    assert whole.sha256 == plain.sha256


@pytest.mark.parametrize(
    "keep", [{"ffn": 0.5}, {"heads": 0.5}, {"kv_groups": 0.5}, {"blocks": 0.5}]
)
def test_uniform_models_are_plain_for_transformers(tmp_path: Path, keep: dict[str, float]) -> None:
    """Its own loader opens the folder, with the same logits."""
    from transformers import AutoModelForCausalLM

    dense = _make(tmp_path)
    cut, *_ = _cut(dense, tmp_path, keep, structure={"uniform": True})
    assert cut.shape.is_uniform
    theirs = AutoModelForCausalLM.from_pretrained(cut.folder, dtype=torch.float32)
    ids = torch.tensor([TRACES[0].ids])
    with torch.inference_mode():
        expected, found = theirs(input_ids=ids).logits, load_model(cut)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_interrupted_cut_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """What is decided and what is finished is read back: widths, kept units, rows."""
    dense = _make(tmp_path)
    keep = {"ffn": 0.5, "heads": 0.75, "blocks": 0.75}
    whole, *expected = _cut(dense, tmp_path / "whole", keep, Pruning(sparsity=0.5))

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / "blocks", again / "blocks")
    for file in (again / "blocks").glob("*-00001.*"):
        file.unlink()
    resumed, *found = _cut(dense, again, keep, Pruning(sparsity=0.5))
    assert found == expected
    assert resumed.sha256 == whole.sha256


def test_a_linear_that_stays_dense_is_cut_all_the_same(tmp_path: Path) -> None:
    """It has no zeros, and the folder computes what the walk saw."""
    dense = _make(tmp_path, "qwen2", attention_bias=True, hidden_size=128)
    settings = Pruning(sparsity=0.5, ignore=("down_proj", "o_proj", "q_proj"))
    cut, linears, blocks = _cut(dense, tmp_path, {"ffn": 0.5, "heads": 0.5}, settings)

    assert [row.drift for row in blocks] == pytest.approx(
        _drifts(dense, cut, tuple(range(4))), rel=1e-3
    )
    for row in linears:
        stays = any(part in row.name for part in settings.ignore)
        assert row.actual_sparsity == pytest.approx(0.0 if stays else 0.5, abs=1e-3)


def test_targets_of_a_narrower_linear_give_the_dense_output() -> None:
    """Against one least-squares solve in float64: the dense linear has more and other inputs."""
    generator = torch.Generator().manual_seed(0)
    dense_NJ = torch.randn(60, 12, generator=generator)
    x_NI = dense_NJ[:, :8] + 0.3 * torch.randn(60, 8, generator=generator)
    dense_OJ = torch.randn(5, 12, generator=generator)
    weight_OI = torch.randn(5, 8, generator=generator)
    statistic = InputStatistic(8, CPU, [weight_OI], [dense_OJ])
    statistic.add(x_NI[None], dense_NJ[None], torch.zeros(1, 60, dtype=torch.long))
    statistic.reduce(WorkShare(WHOLE_SHARE, {("linear",): 1}), ["linear"])
    hessian = statistic.hessian(0.01)
    found_OI = statistic.solve_targets([0], hessian)[0]

    # Damping is a token for each input, of its size, whose output is the narrower linear's own.
    x_NI, dense_NJ = x_NI.double(), dense_NJ.double()
    more_II = (0.01 * x_NI.square().sum(0).mean()).sqrt() * torch.eye(8).double()
    inputs_XI = torch.cat([x_NI, more_II])
    outputs_XO = torch.cat([dense_NJ @ dense_OJ.T.double(), more_II @ weight_OI.T.double()])
    expected_IO = torch.linalg.lstsq(inputs_XI, outputs_XO).solution
    torch.testing.assert_close(found_OI.double(), expected_IO.T, rtol=1e-4, atol=1e-4)


def test_an_n_m_pattern_is_chosen_in_what_is_left(tmp_path: Path) -> None:
    """2:4 along the inputs that stay."""
    dense = _make(tmp_path)
    cut, *_ = _cut(dense, tmp_path, {"ffn": 0.75, "heads": 0.5}, Pruning(pattern="2:4"))
    for block in range(4):
        for linear in dense.family.linears:
            weight_OI = torch.from_numpy(cut.read(f"model.layers.{block}.{linear}.weight"))
            assert ((weight_OI.view(-1, 4) != 0).sum(1) == 2).all()


def test_units_are_shared_out_with_the_least_sum_of_errors() -> None:
    """Against every way to share them out; curves are convex, as errors of removal mostly are."""
    generator = torch.Generator().manual_seed(4)
    layouts = [UnitLayout("F", 5, {"F": 1})] * 4
    for _ in range(20):
        curves = []
        for _ in layouts:
            steps = torch.rand(4, generator=generator).sort().values.cumsum(0).tolist()
            curves.append({5: 0.0} | {4 - i: error for i, error in enumerate(steps)})
        found = allocate_units(layouts, curves, 0.6)
        ways = [way for way in itertools.product(range(1, 6), repeat=4) if sum(way) == 12]
        best = min(sum(c[n] for c, n in zip(curves, way, strict=True)) for way in ways)
        assert sum(found) == 12
        spent = sum(curve[count] for curve, count in zip(curves, found, strict=True))
        assert spent == pytest.approx(best)


@pytest.mark.parametrize(
    ("keep", "uniform", "code", "named"),
    [
        ({"ffn": 0.1}, False, "share-not-reachable", "12.8 of 128"),
        ({"ffn": 0.02}, False, "share-not-reachable", "2.56 of 128"),
        ({"ffn": 0.99}, False, "share-not-reachable", "32 of 128"),
        ({"heads": 0.75}, True, "share-not-reachable", "3 of 4"),
        ({"kv_groups": 0.7}, False, "share-not-reachable", "1.4 of 2"),
        ({"heads": 0.5, "kv_groups": 0.5}, False, "heads-with-kv-groups", "kv_groups"),
        ({"blocks": 0.9}, False, "share-not-reachable", "4 of 4"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, keep: dict[str, float], uniform: bool, code: str, named: str
) -> None:
    """Before any work, with the shares that can be."""
    structure = Structure(keep=keep, uniform=uniform)
    dense = _make(tmp_path)
    part = [*keep][-1]
    with raises(code, named):
        plugins.load("structures", part).check(dense, structure)


def test_one_block_that_attends_and_one_with_a_state_stay(tmp_path: Path) -> None:
    """Also where the removal of the only one that attends would change nothing."""
    dense = _make(tmp_path, "lfm2", layer_types=["conv", "conv", "full_attention", "conv"])
    tensors = load_file(dense.folder / "model.safetensors")
    for name in ("self_attn.out_proj", "feed_forward.w2"):
        tensors[f"model.layers.2.{name}.weight"].zero_()
    save_file(tensors, dense.folder / "model.safetensors", metadata={"format": "pt"})

    cut, *_ = _cut(dense, tmp_path, {"blocks": 0.5})
    assert sorted(cut.shape.layer_types) == ["conv", "full_attention"]

    with raises("share-not-reachable", "1 of 4", "between 0.5 and 0.75"):
        plugins.load("structures", "blocks").check(dense, Structure(keep={"blocks": 0.25}))


def test_blocks_of_a_model_that_numbers_them_are_refused(tmp_path: Path) -> None:
    """And the feed-forward part of experts."""
    with raises("part-cannot-be-cut", "--keep blocks"):
        plugins.load("structures", "blocks").check(
            _make(tmp_path, "smollm3"), Structure(keep={"blocks": 0.5})
        )
    with raises("part-cannot-be-cut", "Qwen3MoeForCausalLM", "--keep ffn"):
        plugins.load("structures", "ffn").check(
            _make(tmp_path, "qwen3_moe"), Structure(keep={"ffn": 0.5})
        )

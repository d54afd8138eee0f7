"""Experts: pruned on the tokens that reach them, and removed by what their absence costs."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.pruning.structure.prunable_units import PrunableUnits
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.pruning.walk.batches import make_batches
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import InputStatistic
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.recipe import Pruning, Structure
from racdeploy.results.pruning import BlockRow, LinearRow
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import make_trace

CALIBRATION = [make_trace(i, 5 + i % 7, 30, 4) for i in range(24)]
HELD_OUT = [make_trace(60 + i, 6, 20, 3) for i in range(3)]
E, LOUD, UNUSED, QUIET = 8, 3, 6, 1
CUT = {"experts": 0.75}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Eight experts: one is loud, one quiet, and one is never chosen.

    Its row of the router is zero. Two pairs of rows are opposite, so that two are above it always.
    """
    folder = tmp_path_factory.mktemp("experts") / "model"
    make_checkpoint(folder, "qwen3_moe", dtype="float32", num_experts=E)
    weights = load_file(folder / "model.safetensors")
    for block in range(2):
        mlp = f"model.layers.{block}.mlp"
        weights[f"{mlp}.experts.{LOUD}.down_proj.weight"] *= 6
        weights[f"{mlp}.experts.{QUIET}.down_proj.weight"] *= 0.05
        router_ED = weights[f"{mlp}.gate.weight"]
        router_ED[UNUSED] = 0
        router_ED[[0, 2]] = -router_ED[[7, 5]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def run(
    dense: Checkpoint, folder: Path, keep: Mapping[str, float] | None = None, **settings: Any
) -> tuple[Checkpoint, list[LinearRow], list[BlockRow]]:
    """Cut and prune, and return the model as it is read back."""
    criterion = settings.pop("criterion", "error")
    structure = Structure(keep=dict(keep or {}), criterion=criterion, uniform=True)
    blocks = folder / "blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    given = Pruning.model_validate({"expert_tokens": 1, **settings})
    rows = prune_blocks(dense, CALIBRATION, HELD_OUT, given, blocks, structure=structure)
    shape = read_cut_plan(blocks).shape(dense.shape, structure)
    return Checkpoint(assemble(dense, blocks, folder / "model", shape)), *rows


def routing(
    model: nn.Module, block: int, traces: Any = CALIBRATION
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what reaches the experts of a block of a whole model: hidden values, and choices."""
    seen: list[tuple[torch.Tensor, ...]] = []
    experts = model.get_submodule(f"model.layers.{block}.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.inference_mode():
        for trace in traces:
            model(input_ids=torch.tensor([trace.ids]))
    handle.remove()
    return torch.cat([given[0] for given in seen]), torch.cat([given[1] for given in seen])


def last_states(model: nn.Module, traces: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(
            [
                model.get_submodule("model")(input_ids=torch.tensor([trace.ids])).last_hidden_state[
                    0
                ]
                for trace in traces
            ]
        )


@pytest.fixture(scope="module")
def pruned(
    dense: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[LinearRow], list[BlockRow]]:
    """Half of the weights of all linears."""
    return run(dense, tmp_path_factory.mktemp("half"), sparsity=0.5, expert_tokens=120)


def test_rows_say_how_many_tokens_an_expert_had_and_who_had_too_few(
    dense: Checkpoint, pruned: tuple[Checkpoint, list[LinearRow], list[BlockRow]]
) -> None:
    """As the router of the pruned model sends them; attention's rows say nothing of it."""
    model, rows, _ = pruned
    found = {row.name: row for row in rows}
    assert len(rows) == 2 * (4 + 3 * E)
    assert len({row.pooled for row in rows}) == 2

    for block in range(2):
        _, chosen_NK = routing(load_model(model), block)
        counts = torch.bincount(chosen_NK.flatten(), minlength=E).tolist()
        assert counts[UNUSED] == 0
        for expert, count in enumerate(counts):
            for linear in ("gate_proj", "up_proj", "down_proj"):
                row = found[f"model.layers.{block}.mlp.experts.{expert}.{linear}"]
                assert (row.tokens, row.pooled) == (count, count < 120)
                assert row.actual_sparsity == 0.5
                assert (row.held_out_error is None) == (expert == UNUSED)
        attention = found[f"model.layers.{block}.self_attn.q_proj"]
        assert (attention.tokens, attention.pooled) == (None, False)


def test_an_expert_with_too_few_tokens_is_pruned_on_all_of_them(
    pruned: tuple[Checkpoint, list[LinearRow], list[BlockRow]],
) -> None:
    """Its importance is the mean square over every token, of its own inner values for down_proj."""
    model, rows, _ = pruned
    found = load_file(model.folder / IMPORTANCE_FILE)
    pooled = {row.name: row.pooled for row in rows}
    torch_model: Any = load_model(model)
    hidden_ND, chosen_NK = routing(torch_model, 0)

    for expert in range(E):
        name = f"model.layers.0.mlp.experts.{expert}"
        is_own_N = (chosen_NK == expert).any(1)
        seen_ND = hidden_ND if pooled[f"{name}.gate_proj"] else hidden_ND[is_own_N]
        with torch.inference_mode():
            inner_NF = torch_model.model.layers[0].mlp.experts[expert].intermediate(seen_ND)
        for linear, input_NI in (("up_proj", seen_ND), ("down_proj", inner_NF)):
            mean_I = found[f"{name}.{linear}.weight"]
            torch.testing.assert_close(mean_I, input_NI.square().mean(0), rtol=1e-4, atol=1e-6)
            assert int(found[f"{name}.{linear}.weight.tokens"]) == len(input_NI)


def test_the_target_is_the_dense_expert_on_the_dense_models_values(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the tokens that the sparse model sends: by numpy's least squares, in the second block."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = InputStatistic.solve_targets

    def remember(self: InputStatistic, indices: Any, hessian: Hessian) -> Any:
        found = original(self, indices, hessian)
        seen.extend((self.matched_weights[index], found[index]) for index in indices)
        return found

    monkeypatch.setattr(InputStatistic, "solve_targets", remember)
    settings = {"sparsity": 0.5, "damping": 1e-6, "target": "dense_output"}
    model, *_ = run(dense, tmp_path, **settings)

    full_OI = torch.from_numpy(dense.read(f"model.layers.1.mlp.experts.{LOUD}.up_proj.weight"))
    (target_OI,) = [found for match, found in seen if torch.equal(match, full_OI)]

    own_ND, chosen_NK = routing(load_model(model), 1)
    dense_ND, dense_NK = routing(load_model(dense), 1)
    token_N = (chosen_NK == LOUD).any(1)
    assert not torch.equal(token_N, (dense_NK == LOUD).any(1)), "the two models route alike"

    wanted_NO = dense_ND[token_N].double() @ full_OI.T.double()
    expected_IO = np.linalg.lstsq(own_ND[token_N].double().numpy(), wanted_NO.numpy())[0]
    np.testing.assert_allclose(target_OI.numpy(), expected_IO.T, rtol=1e-3, atol=2e-4)
    assert (target_OI - full_OI).abs().max() > 0.01


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_errors_are_below_those_of_magnitude(
    dense: Checkpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """On held-out traces, of what leaves each block and of the experts' own outputs."""
    found = {}
    for method in ("sparsegpt", "magnitude"):
        plain = {"target": "linear_output", "refit_steps": 0} if method == "magnitude" else {}
        _, rows, blocks = run(dense, tmp_path / method, **settings, **plain, method=method)
        errors = [row.held_out_error for row in rows if "experts" in row.name]
        known = [error for error in errors if error is not None]
        assert np.isfinite(known).all()
        assert len(known) >= 2 * 3 * (E - 1)
        found[method] = sum(known), *(row.drift for row in blocks)

    for own, other in zip(*found.values(), strict=True):
        assert 0 < own < other


def test_the_drift_is_that_of_whole_forward_passes(dense: Checkpoint, tmp_path: Path) -> None:
    """Pruned, cut, renumbered and read back: what the walk saw is what the folder computes."""
    cut, rows, blocks = run(dense, tmp_path, {**CUT, "heads": 0.5}, sparsity=0.4)
    states = []
    for checkpoint in (dense, cut):
        model = load_model(checkpoint)
        model.get_submodule("model").norm = nn.Identity()
        states.append(last_states(model, HELD_OUT))

    drift = (states[1] - states[0]).square().sum() / states[0].square().sum()
    assert blocks[-1].drift == pytest.approx(float(drift), rel=1e-3)
    assert {round(row.actual_sparsity, 2) for row in rows} == {0.4}
    assert (
        cut.shape.num_experts
        == json.loads((cut.folder / "config.json").read_text())["num_experts"]
        == 6
    )
    assert len(rows) == 2 * (4 + 3 * 6)
    assert {row.name for row in rows} == {
        name.removesuffix(".weight") for name in cut.shape.prunable_weights
    }


@pytest.mark.parametrize("criterion", ["error", "magnitude"])
def test_who_is_missed_most_stays_and_who_is_never_asked_goes(
    dense: Checkpoint, tmp_path: Path, criterion: str
) -> None:
    """By either criterion; the rows of the router go with the experts."""
    plain = {"sparsity": 0.0, "target": "linear_output"}
    cut, *_ = run(dense, tmp_path, CUT, criterion=criterion, **plain)
    for block in range(2):
        report = tmp_path / "blocks" / f"block-{block:05d}.json"
        kept = json.loads(report.read_text())["kept"]["experts"]
        assert len(kept) == 6
        assert LOUD in kept
        assert UNUSED not in kept
        assert QUIET not in kept or criterion == "error"

        name = f"model.layers.{block}.mlp.gate.weight"
        np.testing.assert_array_equal(cut.read(name), dense.read(name)[kept])
        moved = f"model.layers.{block}.mlp.experts.{{}}.up_proj.weight"
        for number, expert in enumerate(kept):
            np.testing.assert_array_equal(
                cut.read(moved.format(number)), dense.read(moved.format(expert))
            )


@pytest.fixture
def at_first_block(
    dense: Checkpoint, tmp_path: Path
) -> Iterator[tuple[PruningSession, CalibrationPass, nn.Module]]:
    """All that decides which experts of the first block stay."""
    batches = make_batches(CALIBRATION, ["gcd"], held_out=False)
    blocks = BlockwiseModel(dense)
    session = PruningSession(blocks, batches, batches, Pruning(), tmp_path)
    flow = CalibrationPass(blocks, batches, tmp_path, "found")
    with torch.inference_mode():
        for index, hidden_BTD in enumerate(blocks.embed(batches)):
            flow.hidden[index] = hidden_BTD
        yield session, flow, blocks.load_block(0)


def _choose(
    criterion: str, given: tuple[PruningSession, CalibrationPass, nn.Module], count: int
) -> list[int]:
    units: PrunableUnits = plugins.load("structures", "experts").ExpertUnits(*given)
    plugins.load("criteria", criterion).remove_units(units, count)
    return units.kept


def test_those_stay_whose_output_changes_least_of_all_sets(
    at_first_block: tuple[PruningSession, CalibrationPass, nn.Module],
) -> None:
    """Of all 28 pairs and 56 sets of three that could go."""
    plugin = plugins.load("structures", "experts")
    probe = plugin.ExpertProbe(*at_first_block)
    for count in (6, 5):
        changes = {left: probe.measure(left) for left in itertools.combinations(range(E), count)}
        best = min(changes, key=changes.__getitem__)
        assert _choose("error", at_first_block, count) == list(best)

    by_norm = _choose("magnitude", at_first_block, 6)
    norms = plugin.measure_expert_norms(*at_first_block)
    assert set(range(E)) - set(by_norm) == set(sorted(range(E), key=norms.__getitem__)[:2])


def test_the_norm_of_an_expert_is_weighted_by_its_share(
    dense: Checkpoint, at_first_block: tuple[PruningSession, CalibrationPass, nn.Module]
) -> None:
    """The mean over its tokens of share times norm, against whole forward passes."""
    norms = plugins.load("structures", "experts").measure_expert_norms(*at_first_block)
    model: Any = load_model(dense)
    mixture = model.model.layers[0].mlp
    hidden_ND, chosen_NK = routing(model, 0)
    logits_NE = hidden_ND @ mixture.gate.weight.T

    for expert in range(E):
        is_own_N = (chosen_NK == expert).any(1)
        shares_NK = logits_NE.gather(1, chosen_NK).softmax(1)
        share_N = (shares_NK * (chosen_NK == expert)).sum(1)
        with torch.inference_mode():
            size_N = mixture.experts[expert](hidden_ND).norm(dim=1)
        expected = float((share_N * size_N)[is_own_N].mean()) if is_own_N.any() else 0.0
        assert norms[expert] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_cost_of_an_expert_is_that_of_its_removal(
    dense: Checkpoint, at_first_block: tuple[PruningSession, CalibrationPass, nn.Module]
) -> None:
    """Against the model whose router is without it, token by token."""
    probe = plugins.load("structures", "experts").ExpertProbe(*at_first_block)
    costs = probe.compute_rises(range(E))
    model: Any = load_model(dense)
    block = model.model.layers[0]
    seen: list[torch.Tensor] = []
    block.register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )

    def outputs() -> torch.Tensor:
        seen.clear()
        last_states(model, CALIBRATION)
        return torch.cat([each.reshape(-1, each.shape[-1]) for each in seen])

    whole_ND = outputs()
    experts = list(block.mlp.experts)
    router_ED = block.mlp.gate.weight
    for expert in range(E):
        others = [other for other in range(E) if other != expert]
        block.mlp.experts = type(block.mlp.experts)([experts[other] for other in others])
        block.mlp.gate.weight = nn.Parameter(router_ED[others], requires_grad=False)
        change_N = (outputs() - whole_ND).square().sum(1) / whole_ND.square().sum(1)
        assert costs[expert] == pytest.approx(float(change_N.sum()), rel=1e-3, abs=1e-6)

    assert max(costs, key=costs.__getitem__) == LOUD
    assert costs[UNUSED] == 0


def test_a_resumed_walk_ends_with_the_same_bytes(dense: Checkpoint, tmp_path: Path) -> None:
    """The experts that were chosen, their tokens and their weights are read back."""
    settings = {"sparsity": 0.5, "expert_tokens": 120}
    whole, *expected = run(dense, tmp_path / "whole", CUT, **settings)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / "blocks", again / "blocks")
    for file in (again / "blocks").glob("*-00001.*"):
        file.unlink()
    resumed, *found = run(dense, again, CUT, **settings)
    assert found == expected
    assert resumed.sha256 == whole.sha256
    for file in (tmp_path / "whole" / "blocks").iterdir():
        assert file_sha256(file) == file_sha256(again / "blocks" / file.name)


def test_more_passes_leave_the_same_bytes(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is for the sums of one expert at a time."""
    found = []
    for name, size_bytes in (("together", 2 << 30), ("alone", 1)):
        monkeypatch.setattr("racdeploy.pruning.walk.expert_linears.EXPERT_BYTES", size_bytes)
        run(dense, tmp_path / name, sparsity=0.5, expert_tokens=120)
        files = sorted((tmp_path / name / "blocks").iterdir())
        found.append({file.name: file_sha256(file) for file in files})
    assert found[0] == found[1]


def test_transformers_opens_what_is_left(dense: Checkpoint, tmp_path: Path) -> None:
    """Its own loader, with the same logits."""
    from transformers import AutoModelForCausalLM

    cut, *_ = run(dense, tmp_path, CUT, sparsity=0.5)
    theirs = AutoModelForCausalLM.from_pretrained(cut.folder, dtype=torch.float32)
    ids = torch.tensor([CALIBRATION[0].ids])
    with torch.inference_mode():
        expected, found = theirs(input_ids=ids).logits, load_model(cut)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("share", "named"), [(0.2, "2 of 8"), (0.99, "none of 8")])
def test_what_cannot_be_kept_is_refused(tmp_path: Path, share: float, named: str) -> None:
    """Before any work, with the shares that can be."""
    config = {"num_experts": 8, "num_experts_per_tok": 3}
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe", **config))
    check = plugins.load("structures", "experts").check
    with raises("share-not-reachable", named, "0.875, 0.75, 0.625, 0.5, 0.375"):
        check(checkpoint, Structure(keep={"experts": share}))
    check(checkpoint, Structure(keep={"experts": 0.375}))


def test_a_model_without_experts_has_none_to_cut(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "llama"))
    with raises("part-cannot-be-cut", "LlamaForCausalLM", "--keep experts"):
        plugins.load("structures", "experts").check(checkpoint, Structure(keep=CUT))

"""What a search looks at: every format of the target, alone, with cuts and with zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe, Tune
from racdeploy.report.toml_writer import to_toml
from racdeploy.tuning.candidates import CandidateSpec, propose_candidates
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

Propose = Callable[..., tuple[list[CandidateSpec], dict[str, str]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Propose:
    """Proposals for a small Qwen3 and a target, with keys of [tune]."""
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    model = make_checkpoint(folder, "qwen3", intermediate_size=128)

    def propose_for(
        target: str = "gguf", **given: Any
    ) -> tuple[list[CandidateSpec], dict[str, str]]:
        tune = {key: given.pop(key) for key in [*given] if key in Tune.model_fields}
        values = {"model": str(model), "target": target, "tune": tune, **given}
        return propose_candidates(Job(Recipe.combine(None, values)))

    return propose_for


def test_formats_are_tried_alone_with_cuts_and_with_zeros(ask: Propose) -> None:
    """Each once: narrow formats with codes that are chosen, wide ones rounded."""
    choices, _ = ask(quants=("q8_0", "q4_0"), ffn=(0.5,), zeros=(0.5, "2:4"))
    kinds = {choice.name: choice.kind for choice in choices}
    assert kinds["q4_0"] == "dense"
    assert kinds["ffn 0.5, q8_0"] == "ffn 0.5"
    assert kinds["50% zeros, q4_0"] == "50% zeros"
    assert kinds["2:4 zeros, q8_0"] == "2:4 zeros"
    assert len(kinds) == len(choices) == 8
    assert all(bool(each.job.rounding_quants) == each.name.endswith("q4_0") for each in choices)


def test_all_candidates_share_the_problems(ask: Propose) -> None:
    """They are drawn once, however many candidates there are."""
    choices, _ = ask(quants=("q8_0", "q4_0"), ffn=(0.5,))
    assert len({id(choice.job.tasks) for choice in choices}) == 1


def test_what_a_target_proposes_is_not_in_a_candidate_that_prunes_nothing(ask: Propose) -> None:
    """The target gguf proposes a cut, which a dense model has not."""
    dense, cut = (choice.recipe for choice in ask(quants=("q8_0",), ffn=(0.5,))[0])
    assert not dense.structure.keep
    assert dense.prune.sparsity == 0
    assert cut.structure.keep == {"ffn": 0.5}
    assert cut.export.packing == "plain"


def test_zeros_are_packed_where_a_packing_takes_the_format(ask: Propose) -> None:
    """Elsewhere they make no file smaller, and the reason is kept."""
    choices, left_out = ask(quants=("q4_0", "q6_k"), ffn=(), zeros=(0.5,))
    packed = {each.name: each.recipe.export.packing for each in choices if not each.dense}
    assert packed == {"50% zeros, q4_0": "bitmask"}
    assert "does not work with quant 'q6_k'" in left_out["50% zeros, q6_k"]


def test_a_recovered_twin_stands_beside_what_is_pruned(ask: Propose) -> None:
    """And not beside what is dense; fewer tokens stand beside both."""
    choices, left_out = ask(quants=("q8_0",), ffn=(0.5,), recover_tokens=1000, vocabulary=(300,))
    names = {choice.name for choice in choices} | set(left_out)
    assert names == {
        "q8_0",
        "ffn 0.5, q8_0",
        "ffn 0.5, recovered, q8_0",
        "300 tokens, q8_0",
        "300 tokens, recovered, q8_0",
        "300 tokens, ffn 0.5, q8_0",
        "300 tokens, ffn 0.5, recovered, q8_0",
    }


def test_a_target_that_takes_few_formats_gets_no_others(ask: Propose) -> None:
    """And a format that it refuses is refused when it is asked for, if no other is left."""
    found, _ = ask("raspberry-pi-5", ffn=())
    assert {choice.recipe.export.quant for choice in found} <= {
        *("q4_0", "q5_0", "q8_0", "q4_k", "q3_k")
    }

    with raises("no-quant-left", "'q6_k'"):
        ask("raspberry-pi-5", quants=("q6_k",), ffn=())


def test_onnx_has_formats_of_its_own(ask: Propose) -> None:
    """Those of MatMulNBits and k_quant."""
    found, _ = ask("onnx", ffn=())
    quants = {choice.recipe.export.quant for choice in found}
    assert {"matmulnbits_4", "matmulnbits_8"} <= quants
    assert "q8_0" not in quants


def test_the_recipe_of_a_candidate_builds_it_again(ask: Propose, tmp_path: Path) -> None:
    """As the file that a search writes, with what the user asked of the search."""
    own = {"traces": {"count": 88}, "prune": {"method": "magnitude"}, "tasks": ["gcd"]}
    zeros = (0.5, "2:4")
    for target, quant in (("gguf", "q4_0"), ("raspberry-pi-5", "q4_0"), ("onnx", "k_quant")):
        choices, _ = ask(
            target, quants=(quant,), ffn=(0.75,), zeros=zeros, vocabulary=(300,), **own
        )
        assert len(choices) > 2
        for choice in choices:
            file = tmp_path / "recipe.toml"
            file.write_text(
                to_toml(choice.recipe.model_dump(mode="json", exclude={"tune"})), encoding="utf-8"
            )
            again = Recipe.combine(file, {})
            without: dict[str, Any] = {"tune": True, "structure": {"optional"}}
            assert again.model_dump(exclude=without) == choice.recipe.model_dump(exclude=without)

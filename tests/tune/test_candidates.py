"""What a search looks at: every format of the target, alone, with cuts and with zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from racdeploy.errors import UsageError
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.tune.candidates import Proposals, propose
from tests.support.tiny_models import make_checkpoint

Propose = Callable[..., Proposals]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Propose:
    """Proposals for a small Qwen3 and a target, with keys of [tune]."""
    model = make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")

    def propose_for(target: str = "gguf", **tune: Any) -> Proposals:
        values = {"model": str(model), "target": target, "tune": tune}
        return propose(Job(Recipe.combine(None, values)))

    return propose_for


def test_formats_are_tried_alone_with_cuts_and_with_zeros(ask: Propose) -> None:
    """Each with rounded and, codes, and nothing twice."""
    found = ask(quants=("q8_0", "q4_0"), ffn=(0.5,), zeros=(0.5,), patterns=("2:4",))
    kinds = {choice.name: choice.kind for choice in found.choices}
    assert kinds["q4_0"] == "dense"
    assert kinds["q4_0, codes"] == "dense codes"
    assert kinds["ffn 0.5, q8_0"] == "cut"
    assert kinds["50% zeros, q4_0, codes"] == "zeros codes"
    assert kinds["2:4 zeros, q8_0"] == "zeros"
    assert len(kinds) == len(found.choices) == 16


def test_what_a_target_proposes_is_not_in_a_candidate_that_prunes_nothing(ask: Propose) -> None:
    """The target gguf proposes a cut, which a dense model has not."""
    found = ask(quants=("q8_0",), ffn=(0.5,), zeros=(), patterns=())
    dense, cut = (choice.recipe for choice in found.choices if "codes" not in choice.kind)
    assert not dense.structure.keep
    assert dense.prune.sparsity == 0
    assert cut.structure.keep == {"ffn": 0.5}
    assert cut.export.packing == "plain"


def test_zeros_are_packed_where_a_packing_takes_the_format(ask: Propose) -> None:
    """Elsewhere they make no file smaller, and the reason is kept."""
    found = ask(quants=("q4_0", "q6_k"), ffn=(), zeros=(0.5,), patterns=())
    packed = {c.name: c.recipe.export.packing for c in found.choices if c.kind == "zeros"}
    assert packed == {"50% zeros, q4_0": "bitmask"}
    assert "does not go with quant 'q6_k'" in found.left_out["50% zeros, q6_k"]


def test_a_recovered_twin_stands_beside_what_is_pruned(ask: Propose) -> None:
    """And not beside what is dense."""
    found = ask(quants=("q8_0",), ffn=(0.5,), zeros=(), patterns=(), recover_tokens=1000)
    names = {choice.name for choice in found.choices if "codes" not in choice.kind}
    assert names == {"q8_0", "ffn 0.5, q8_0", "ffn 0.5, q8_0, recovered"}


def test_a_target_that_takes_few_formats_gets_no_others(ask: Propose) -> None:
    """And a format that it refuses is refused when it is asked for, if no other is left."""
    found = ask("raspberry-pi-5", ffn=(), zeros=(), patterns=())
    assert {choice.recipe.export.quant for choice in found.choices} <= {
        *("q4_0", "q5_0", "q8_0", "q4_k", "q3_k")
    }

    with pytest.raises(UsageError, match="does not take quant 'q6_k'"):
        ask("raspberry-pi-5", quants=("q6_k",), ffn=(), zeros=(), patterns=())


def test_onnx_has_formats_of_its_own(ask: Propose) -> None:
    """Those of MatMulNBits and k_quant."""
    found = ask("onnx", ffn=(), zeros=(), patterns=())
    quants = {choice.recipe.export.quant for choice in found.choices}
    assert {"matmulnbits_4", "matmulnbits_8"} <= quants
    assert "q8_0" not in quants


def test_settings_build_the_candidate_again(ask: Propose, tmp_path: Path) -> None:
    """What is given to racdeploy build makes the same recipe."""
    found = ask(quants=("q4_0",), ffn=(0.5,), zeros=(0.5,), patterns=("2:4",))
    for choice in found.choices:
        asked = {"model": choice.recipe.model, **choice.given}
        again = Recipe.combine(None, asked)
        for part in ("prune", "structure", "export", "recover"):
            own, other = getattr(again, part), getattr(choice.recipe, part)
            assert own.model_dump(exclude={"optional"}) == other.model_dump(exclude={"optional"})

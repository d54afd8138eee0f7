"""Divergence and slope against autograd, over the whole vocabulary, a chunk at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recovery import divergence
from racdeploy.recovery.divergence import Direction, LMHead, kl_and_gradient, measure_kl
from tests.support.tiny_models import make_checkpoint

N, D, V = 37, 16, 101
HEADS = [(1.0, 0.0), (4.0, 0.0), (1.0, 3.0), (2.0, 5.0)]


def make_case(
    divisor: float, cap: float
) -> tuple[LMHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a head, hidden states of both models, and weights of the tokens."""
    generator = torch.Generator().manual_seed(3)
    head = LMHead(torch.randn(V, D, generator=generator), divisor, cap)
    own_ND = torch.randn(N, D, generator=generator)
    dense_ND = own_ND + 0.3 * torch.randn(N, D, generator=generator)
    weight_N = torch.rand(N, generator=generator)
    return head, own_ND, dense_ND, weight_N


def textbook(
    head: LMHead, own_ND: torch.Tensor, dense_ND: torch.Tensor, direction: Direction
) -> torch.Tensor:
    """Return the divergence of every token in float64, from probabilities."""

    def probabilities(hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = hidden_ND @ head.weight_VD.double().T / head.logit_divisor
        if head.softcap:
            logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
        return torch.softmax(logits_NV, 1)

    pair = (probabilities(dense_ND.double()), probabilities(own_ND))
    p_NV, q_NV = pair if direction == "forward" else pair[::-1]
    return (p_NV * (p_NV / q_NV).log()).sum(1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("divisor", "cap"), HEADS)
def test_value_and_slope_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, direction: Direction, divisor: float, cap: float
) -> None:
    """To 1e-4 of the largest slope: float32 sums of 101 terms, each good to 1e-7 of logits near 20,
    which exp() makes 2e-6.
    """
    monkeypatch.setattr(divergence, "_CHUNK_LOGITS", 5 * V)  # 8 chunks, the last one shorter
    head, own_ND, dense_ND, weight_N = make_case(divisor, cap)

    leaf_ND = own_ND.double().requires_grad_(True)
    expected_N = textbook(head, leaf_ND, dense_ND, direction)
    (expected_N * weight_N).sum().backward()

    total, slope_ND = kl_and_gradient(head, own_ND, dense_ND, weight_N, direction)
    expected_ND = leaf_ND.grad
    assert expected_ND is not None
    expected = float((expected_N.detach() * weight_N).sum())
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert (slope_ND - expected_ND).abs().max() < 1e-4 * expected_ND.abs().max()

    if direction == "forward":
        found_N = measure_kl(head, own_ND, dense_ND)
        assert torch.allclose(found_N.double(), expected_N.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_short_products_know_how_far_apart_two_models_are(direction: Direction) -> None:
    """Even where logits are rounded by more than the models differ: to 2 % of value and slope, of
    which bfloat16's 2⁻⁹ in each of two products is 0.4 %, and the rest that p is rounded.
    """
    head, own_ND, _, weight_N = make_case(1.0, 0.0)
    near_ND = own_ND + 3e-3 * torch.randn(N, D, generator=torch.Generator().manual_seed(8))
    short = replace(head, bfloat16_VD=head.weight_VD.bfloat16())

    expected, slope_ND = kl_and_gradient(head, own_ND, near_ND, weight_N, direction)
    found, found_ND = kl_and_gradient(short, own_ND, near_ND, weight_N, direction)
    assert float(found) == pytest.approx(float(expected), rel=0.02)
    assert (found_ND - slope_ND).norm() < 0.02 * slope_ND.norm()

    # Rounding both models' logits on their own is far off: that is what the difference is for.
    rounded = LMHead(short.bfloat16_VD.float())  # type: ignore[union-attr]
    apart = (rounded.logits(own_ND).bfloat16() - rounded.logits(near_ND).bfloat16()).float()
    true = head.logits(own_ND) - head.logits(near_ND)
    assert (apart - true).norm() > 0.2 * true.norm()


def test_directions_differ() -> None:
    """The reverse one is another number: nothing above compares a thing with itself."""
    head, *given = make_case(1.0, 0.0)
    forward, _ = kl_and_gradient(head, *given, "forward")
    reverse, _ = kl_and_gradient(head, *given, "reverse")
    assert abs(float(forward - reverse)) > 0.01 * float(forward)


def test_equal_models_do_not_diverge() -> None:
    """Zero, and so is the slope."""
    head, own_ND, _, weight_N = make_case(1.0, 0.0)
    for direction in ("forward", "reverse"):
        total, slope_ND = kl_and_gradient(head, own_ND, own_ND, weight_N, direction)  # type: ignore[arg-type]
        assert float(total) == pytest.approx(0, abs=1e-5)
        assert slope_ND.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "changed", "divisor", "cap"),
    [
        ("llama", {}, 1.0, 0.0),
        ("granite", {"logits_scaling": 8.0}, 8.0, 0.0),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
    ],
)
def test_a_head_makes_the_logits_of_its_model(
    tmp_path: Path, family: str, changed: dict[str, float], divisor: float, cap: float
) -> None:
    """As transformers makes them of the same last hidden states."""
    from racdeploy.engines.backends.transformers.torch_model import load_model

    checkpoint = Checkpoint(make_checkpoint(tmp_path / "m", family, dtype="float32", **changed))
    head = LMHead.from_checkpoint(checkpoint, torch.device("cpu"))
    assert (head.logit_divisor, head.softcap) == (divisor, cap)

    model = load_model(checkpoint)
    ids_1T = torch.arange(9)[None]
    with torch.inference_mode():
        expected_TV = model(input_ids=ids_1T).logits[0]
        hidden_TD = model.model(input_ids=ids_1T).last_hidden_state[0]  # type: ignore[operator,union-attr]
        found_TV = head.logits(hidden_TD)
    assert torch.allclose(found_TV, expected_TV, rtol=1e-5, atol=1e-5)

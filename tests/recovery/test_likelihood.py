"""The likelihood of tokens and of pairs of answers, against autograd of the textbook formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from racdeploy.recovery.divergence import LMHead
from racdeploy.recovery.likelihood import likelihood_and_gradient, measure_likelihood

V, D, N = 40, 6, 30


def given(softcap: float) -> tuple[LMHead, Tensor, Tensor, Tensor]:
    """Return a head, hidden_ND, token_N and weight_N."""
    generator = torch.Generator().manual_seed(3)
    head = LMHead(torch.randn(V, D, generator=generator), softcap=softcap)
    hidden_ND = torch.randn(N, D, generator=generator)
    token_N = torch.randint(V, (N,), generator=generator)
    return head, hidden_ND, token_N, torch.rand(N, generator=generator)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_tokens(softcap: float) -> None:
    """The cross entropy of torch, with its gradient."""
    head, hidden_ND, token_N, weight_N = given(softcap)
    outside_N = torch.full((N,), -1)
    total, slope_ND = likelihood_and_gradient(head, hidden_ND, token_N, outside_N, weight_N)

    hidden_ND.requires_grad_()
    loss_N = functional.cross_entropy(head.logits(hidden_ND), token_N, reduction="none")
    (weight_N @ loss_N).backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(total, (weight_N @ loss_N).detach())
    torch.testing.assert_close(slope_ND, hidden_ND.grad)
    found_N = measure_likelihood(head, hidden_ND.detach(), token_N, outside_N)
    torch.testing.assert_close(found_N, loss_N.detach())


def test_pairs() -> None:
    """Two pairs and tokens outside: the log-odds of LCPO, with each answer's mean probability."""
    head, hidden_ND, token_N, _ = given(0.0)
    lengths = {6: 8, 7: 4, 20: 3, 21: 9, -1: 6}
    pair_N = torch.tensor([name for name, count in lengths.items() for _ in range(count)])
    pair_N = pair_N[torch.randperm(N, generator=torch.Generator().manual_seed(5))]
    weight_N = torch.full((N,), 0.25)
    total, slope_ND = likelihood_and_gradient(head, hidden_ND, token_N, pair_N, weight_N)

    hidden_ND.requires_grad_()
    nll_N = functional.cross_entropy(head.logits(hidden_ND), token_N, reduction="none")

    def odds(answer: int) -> Tensor:
        probability = torch.exp(-nll_N[pair_N == answer].mean())
        return torch.log(probability / (1 - probability))

    expected = nll_N[pair_N == -1].sum()
    for answer in (6, 20):
        tokens = lengths[answer] + lengths[answer + 1]
        expected = expected - tokens * torch.log(torch.sigmoid(odds(answer) - odds(answer + 1)))
    (0.25 * expected).backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(total, 0.25 * expected.detach())
    torch.testing.assert_close(slope_ND, hidden_ND.grad)
    found_N = measure_likelihood(head, hidden_ND.detach(), token_N, pair_N)
    torch.testing.assert_close(0.25 * found_N.sum(), total)

"""Negative log-likelihood of learned tokens, or of preferred against rejected answers.

As in :mod:`racdeploy.recovery.divergence` the gradient is written out by hand, by chunks of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from racdeploy.recovery.divergence import LMHead, chunks

_MIN_NLL = 1e-3  # of an answer's tokens on average: the odds of certainty are infinite


def measure_likelihood(head: LMHead, hidden_ND: Tensor, token_N: Tensor, pair_N: Tensor) -> Tensor:
    """Return loss_N in nats: of a token the negative log-likelihood, in a pair the pair's loss.

    Args:
        head: of the model.
        hidden_ND: last hidden states after the norm.
        token_N: the tokens that they should predict.
        pair_N: twice the number of the token's pair of answers, and 1 more in the rejected one; -1
            outside of pairs.
    """
    return _compare_pairs(_measure_nll(head, hidden_ND, token_N), pair_N)[0]


def likelihood_and_gradient(
    head: LMHead, hidden_ND: Tensor, token_N: Tensor, pair_N: Tensor, weight_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · loss, and its gradient with respect to the hidden states, gradient_ND."""
    loss_N, slope_N = _compare_pairs(_measure_nll(head, hidden_ND, token_N), pair_N)

    gradient_ND = torch.empty_like(hidden_ND, dtype=torch.float32)
    for chunk in chunks(head, len(hidden_ND)):
        logits_NV = head.logits(hidden_ND[chunk])
        gradient_NV = torch.softmax(logits_NV, dim=1)
        gradient_NV.scatter_add_(1, token_N[chunk, None], -torch.ones_like(loss_N[chunk, None]))
        gradient_NV *= (weight_N * slope_N)[chunk, None]
        gradient_ND[chunk] = head.backward(gradient_NV, logits_NV)

    return (weight_N * loss_N).sum(), gradient_ND


def _measure_nll(head: LMHead, hidden_ND: Tensor, token_N: Tensor) -> Tensor:
    """Return nll_N, the negative log-likelihood of each token in nats."""
    nll_N = torch.empty_like(hidden_ND[:, 0])
    for chunk in chunks(head, len(hidden_ND)):
        own_NV = torch.log_softmax(head.logits(hidden_ND[chunk]), dim=1)
        nll_N[chunk] = -own_NV.gather(1, token_N[chunk, None])[:, 0]
    return nll_N


def _compare_pairs(nll_N: Tensor, pair_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss_N, each token's or its pair's, and slope_N of Σ loss by the tokens' likelihood.

    The loss is -log sigmoid(odds of the preferred - odds of the rejected answer), of their mean
    token probabilities, so that length alone is no advantage.

    Source: LCPO, Hong et al. 2025 (arXiv 2508.10164); odds as in ORPO, Hong et al. 2024.
    """
    loss_N, slope_N = nll_N.clone(), torch.ones_like(nll_N)
    paired = pair_N >= 0
    if not paired.any():
        return loss_N, slope_N

    answer_A, index_N = torch.unique(pair_N[paired], return_inverse=True)
    assert len(answer_A) % 2 == 0, "both answers of a pair are in one batch"
    tokens_A = torch.bincount(index_N).float()
    mean_A = torch.zeros_like(tokens_A).index_add_(0, index_N, -nll_N[paired]) / tokens_A

    with torch.enable_grad():
        mean_A.requires_grad_()
        odds_A = mean_A - torch.log(-torch.expm1(mean_A.clamp(max=-_MIN_NLL)))
        loss_P = -logsigmoid(odds_A[::2] - odds_A[1::2])
        tokens_P = tokens_A[::2] + tokens_A[1::2]
        (slope_A,) = torch.autograd.grad((tokens_P * loss_P).sum(), mean_A)

    loss_N[paired] = loss_P.detach()[index_N // 2]
    slope_N[paired] = -(slope_A / tokens_A)[index_N]
    return loss_N, slope_N

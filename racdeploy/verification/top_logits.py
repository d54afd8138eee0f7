"""Divergence of a model from recorded next-token distributions: their most likely tokens.

A whole distribution of 150,000 tokens at a thousand positions is 600 MB; the 64 most likely tokens
and the mass of the others are 0.5 MB. KL over these 65 outcomes is at most that over all tokens
(data processing inequality), and misses only differences among tokens that are unlikely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.engines.engine import Engine, Progress
from racdeploy.errors import ArtifactError
from racdeploy.verification.answer_sampler import TraceIds
from racdeploy.verification.evidence import Divergence, LogitComparison
from racdeploy.verification.measurements import completion_logits

TOP_K = 64
MAX_TOKENS = 256
"""Tokens of a completion that are compared."""
_MIN_MASS = 1e-12

TopLogits = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Ids and log probabilities, id_TK and log_p_TK."""


def record_top_logits(
    engine: Engine, traces: Sequence[TraceIds], progress: Progress | None = None
) -> list[TopLogits]:
    """Return the most likely tokens at each completion token of each trace."""
    recorded = []
    for index, (prompt, completion) in enumerate(traces):
        log_p_TV = _log_softmax(completion_logits(engine, (prompt, completion[:MAX_TOKENS])))
        K = min(TOP_K, log_p_TV.shape[1])
        id_TK = np.argpartition(-log_p_TV, K - 1, axis=1)[:, :K]
        recorded.append((id_TK, np.take_along_axis(log_p_TV, id_TK, 1)))
        if progress:
            progress("record logits", index + 1, len(traces))
    return recorded


def compare_top_logits(
    engine: Engine,
    traces: Sequence[TraceIds],
    recorded: Sequence[TopLogits],
    progress: Progress | None = None,
) -> LogitComparison | None:
    """Run the traces through another model; None without a trace."""
    kl, same, changed = [], [], []
    for index, ((prompt, completion), (id_TK, log_p_TK)) in enumerate(
        zip(traces, recorded, strict=True)
    ):
        log_q_TV = _log_softmax(completion_logits(engine, (prompt, completion[:MAX_TOKENS])))
        log_q_TK = np.take_along_axis(log_q_TV, id_TK, 1)
        kl.append(_measure_kl(log_p_TK, log_q_TK))

        # The other model's first choice, if it is among the recorded tokens.
        is_choice_TK = id_TK == log_q_TV.argmax(1)[:, None]
        chosen_T = np.where(is_choice_TK, log_p_TK, -np.inf).max(1)
        margin_T = log_p_TK.max(1) - chosen_T
        same.append(margin_T == 0)
        changed.append(margin_T > math.log(2))
        if progress:
            progress("compare logits", index + 1, len(traces))

    if not kl:
        return None
    means = [float(np.concatenate(parts).mean()) for parts in (kl, same, changed)]
    return LogitComparison(sum(map(len, kl)), Divergence(*means), traces=len(kl))


def write_top_logits(file: Path, recorded: Sequence[TopLogits]) -> None:
    """Write them as .npz, in 32 bits."""
    arrays: dict[str, NDArray[Any]] = {}
    for index, (id_TK, log_p_TK) in enumerate(recorded):
        arrays[f"ids_{index}"] = id_TK.astype(np.uint32)
        arrays[f"logs_{index}"] = log_p_TK.astype(np.float32)
    np.savez_compressed(file, allow_pickle=False, **arrays)


def read_top_logits(file: Path, traces: Sequence[TraceIds]) -> list[TopLogits]:
    """Read what :func:`write_top_logits` wrote for these traces.

    Raises:
        ArtifactError: the file is damaged, or of other traces.
    """
    recorded = []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for index, (_, completion) in enumerate(traces):
                id_TK = arrays[f"ids_{index}"].astype(np.int64)
                log_p_TK = arrays[f"logs_{index}"].astype(np.float64)
                tokens = min(len(completion), MAX_TOKENS)
                if id_TK.shape != log_p_TK.shape or id_TK.shape[0] != tokens:
                    raise ValueError(f"trace {index} has {id_TK.shape} values")
                recorded.append((id_TK, log_p_TK))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            "logits-damaged", f"{file}: {error}", remedy="record the reference again"
        ) from error
    return recorded


def _measure_kl(log_p_TK: NDArray[np.float64], log_q_TK: NDArray[np.float64]) -> NDArray[Any]:
    """Return KL(p ‖ q) in nats at each position, all other tokens taken as one."""
    kl_T = (np.exp(log_p_TK) * (log_p_TK - log_q_TK)).sum(1)
    rest_p_T, rest_q_T = (
        np.maximum(1 - np.exp(log_TK).sum(1), _MIN_MASS) for log_TK in (log_p_TK, log_q_TK)
    )
    return np.asarray(kl_T + rest_p_T * np.log(rest_p_T / rest_q_T))


def _log_softmax(logits_TV: NDArray[Any]) -> NDArray[np.float64]:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    return np.asarray(shifted_TV - np.log(np.exp(shifted_TV).sum(1, keepdims=True)))

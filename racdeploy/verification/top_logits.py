"""Divergence of models from next-token distributions, of which the most likely tokens are kept.

A whole distribution of 150,000 tokens at a thousand positions is 600 MB; the 64 most likely tokens
and the mass of the others are 1 MB. KL over these 65 outcomes is at most that over all tokens
(data processing inequality), and misses only differences among tokens that are unlikely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from racdeploy.engines.engine import Engine, Logits, Progress
from racdeploy.errors import ArtifactError
from racdeploy.models.renumbering import OldIds, map_new_ids, translate_ids
from racdeploy.verification.answer_sampler import EngineFactory, TraceIds
from racdeploy.verification.evidence import Divergence, LogitComparison
from racdeploy.verification.stats.distributions import Floats

TOP_K = 64
_ROWS = 64  # of logits at a time: they are copied, which costs memory
_BLOCK_TOKENS = 64
_MIN_MASS = 1e-12


class TopLogits(NamedTuple):
    """The most likely tokens of a model at each position of a completion.

    Args:
        id_TK: their ids.
        log_p_TK: their log probabilities.
        lost_T: probability of the tokens that another model lacks, left out of ``log_p_TK``; empty
            if it lacks none.
    """

    id_TK: NDArray[np.int64]
    log_p_TK: Floats
    lost_T: Floats


class LogitDifferences(NamedTuple):
    """KL(reference ‖ other) in nats, equal first choices, and clear changes, at each position.

    A change is clear if the reference gives the other model's first choice less than half the
    probability of its own.
    """

    kl_T: Floats
    same_T: NDArray[np.bool_]
    changed_T: NDArray[np.bool_]


def completion_logits(engine: Engine, trace: TraceIds) -> Logits:
    """Return logits_TV that predict the completion's tokens: from the last prompt token on."""
    prompt, completion = trace
    return engine.logits(prompt + completion)[len(prompt) - 1 : -1]


def take_top(logits_TV: Logits, old_ids: OldIds | None = None) -> TopLogits:
    """Return the most likely tokens.

    Args:
        old_ids: ids of the tokens that another model has; the others are left out, and their
            probability is returned. Ids are then those of the other model.
    """
    ids, logs, lost = [], [], []
    for start in range(0, len(logits_TV), _ROWS):
        rows_TV = logits_TV[start : start + _ROWS]
        lost_T = np.zeros(0)
        if old_ids is not None:
            lost_T = _sum_lost(rows_TV, old_ids)
            rows_TV = rows_TV[:, old_ids]

        id_TK = _find_top(rows_TV)
        ids.append(id_TK)
        logs.append(log_probabilities(rows_TV, id_TK))
        lost.append(lost_T)

    return TopLogits(np.concatenate(ids), np.concatenate(logs), np.concatenate(lost))


def compare_top(top: TopLogits, logits_TV: Logits) -> LogitDifferences:
    """Compare another model's logits with recorded ones; NaN in them is NaN in KL."""
    divergences, same_choices, changed_choices = [], [], []
    for start in range(0, len(logits_TV), _ROWS):
        rows = slice(start, start + _ROWS)
        id_TK = top.id_TK[rows]
        log_p_TK = top.log_p_TK[rows]
        log_q_TK = log_probabilities(logits_TV[rows], id_TK)
        divergences.append(_measure_kl(log_p_TK, log_q_TK))

        # The other model's first choice, if it is among the recorded tokens.
        is_choice_TK = id_TK == logits_TV[rows].argmax(1)[:, None]
        chosen_T = np.where(is_choice_TK, log_p_TK, -np.inf).max(1)
        margin_T = log_p_TK.max(1) - chosen_T
        same_choices.append(margin_T == 0)
        changed_choices.append(margin_T > math.log(2))

    return LogitDifferences(
        np.concatenate(divergences),
        np.concatenate(same_choices),
        np.concatenate(changed_choices),
    )


def record_top_logits(
    engine: Engine,
    traces: Sequence[TraceIds],
    progress: Progress | None = None,
    old_ids: OldIds | None = None,
) -> list[TopLogits]:
    """Return the most likely tokens at each completion token of each trace, see `take_top`."""
    return [
        take_top(completion_logits(engine, trace), old_ids)
        for trace in _count("record logits", traces, progress)
    ]


def compare_top_logits(
    engine: Engine,
    traces: Sequence[TraceIds],
    recorded: Sequence[TopLogits],
    progress: Progress | None = None,
) -> list[LogitDifferences]:
    """Run the traces through another model, and compare each position."""
    pairs = zip(_count("compare logits", traces, progress), recorded, strict=True)
    return [compare_top(top, completion_logits(engine, trace)) for trace, top in pairs]


def average(compared: Sequence[LogitDifferences]) -> Divergence:
    """Return the means over all positions of all traces."""
    by_figure = zip(*compared, strict=True)
    return Divergence(*(float(np.concatenate(parts).mean()) for parts in by_figure))


def compare_checkpoints(
    pruned: EngineFactory,
    dense: EngineFactory,
    artifact: EngineFactory,
    traces: Sequence[TraceIds],
    old_ids: OldIds | None = None,
    progress: Progress | None = None,
) -> LogitComparison | None:
    """Run the dense model's traces through three models; None if there are no traces.

    Args:
        pruned, dense: open the checkpoints under torch; one model is in memory at a time.
        artifact: opens the exported file on its engine.
        old_ids: dense id of each token of the pruned model, if its vocabulary is smaller. Traces
            with a removed token are left out, and the dense logits are cut to the kept tokens.
    """
    pruned_traces = list(traces)
    if old_ids is not None:
        traces, pruned_traces = renumber_traces(traces, old_ids)
    if not traces:
        return None

    with dense() as engine:
        expected = record_top_logits(engine, traces, progress, old_ids)

    pruning, own = [], []
    with pruned() as engine:
        counted = _count("compare pruned logits", pruned_traces, progress)
        for trace, top in zip(counted, expected, strict=True):
            logits_TV = completion_logits(engine, trace)
            pruning.append(compare_top(top, logits_TV))
            own.append(take_top(logits_TV))

    with artifact() as engine:
        export = compare_top_logits(engine, pruned_traces, own, progress)

    lost_N = np.concatenate([top.lost_T for top in expected])
    return LogitComparison(
        tokens=sum(len(each.kl_T) for each in export),
        export=average(export),
        pruning=average(pruning),
        traces=len(traces),
        lost_mass=float(lost_N.mean()) if lost_N.size else 0.0,
    )


def renumber_traces(
    traces: Sequence[TraceIds], old_ids: OldIds
) -> tuple[list[TraceIds], list[TraceIds]]:
    """Return the traces whose tokens are all kept: in old ids, and in new ids."""
    ids = map_new_ids(old_ids)

    kept = []
    renumbered = []
    for trace in traces:
        prompt, completion = (translate_ids(part, ids) for part in trace)
        if prompt is not None and completion is not None:
            kept.append(trace)
            renumbered.append((prompt, completion))

    return kept, renumbered


def write_top_logits(file: Path, recorded: Sequence[TopLogits]) -> None:
    """Write them as .npz, in 32 bits."""
    arrays: dict[str, NDArray[Any]] = {}
    for index, top in enumerate(recorded):
        arrays[f"ids_{index}"] = top.id_TK.astype(np.uint32)
        arrays[f"logs_{index}"] = top.log_p_TK.astype(np.float32)
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
                if id_TK.shape != log_p_TK.shape or id_TK.shape[0] != len(completion):
                    raise ValueError(f"trace {index} has {id_TK.shape} values")
                recorded.append(TopLogits(id_TK, log_p_TK, np.zeros(0)))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            "logits-damaged", f"{file}: {error}", remedy="record the reference again"
        ) from error
    return recorded


def _count(label: str, traces: Sequence[TraceIds], progress: Progress | None) -> Iterator[TraceIds]:
    for index, trace in enumerate(traces):
        yield trace
        if progress:
            progress(label, index + 1, len(traces))


def _measure_kl(log_p_TK: Floats, log_q_TK: Floats) -> Floats:
    """Return KL(p ‖ q) in nats at each position, all other tokens taken as one."""
    kl_T = (np.exp(log_p_TK) * (log_p_TK - log_q_TK)).sum(1)
    rest_p_T, rest_q_T = (
        np.maximum(1 - np.exp(log_TK).sum(1), _MIN_MASS) for log_TK in (log_p_TK, log_q_TK)
    )
    return np.asarray(kl_T + rest_p_T * np.log(rest_p_T / rest_q_T))


def _sum_lost(logits_TV: Logits, old_ids: OldIds) -> Floats:
    """Return the probability of the tokens that are not among ``old_ids``."""
    all_TV = logits_TV.astype(np.float64)
    all_TV -= all_TV.max(1, keepdims=True)
    np.exp(all_TV, out=all_TV)
    return np.asarray(np.maximum(0, 1 - all_TV[:, old_ids].sum(1) / all_TV.sum(1)))


def _find_top(logits_TV: Logits) -> NDArray[np.int64]:
    """Return the ids of the largest logits, in any order.

    As many blocks of the vocabulary as there are tokens to find have a maximum of at least a
    *floor*, so that only the few logits from there on need to be sorted.
    """
    T, V = logits_TV.shape
    K = min(TOP_K, V)
    blocks = V // _BLOCK_TOKENS
    if blocks < K:
        return np.argpartition(logits_TV, -K, axis=1)[:, -K:]

    blocks_TBC = logits_TV[:, : blocks * _BLOCK_TOKENS].reshape(T, blocks, _BLOCK_TOKENS)
    floor_T = np.partition(blocks_TBC.max(2), -K, axis=1)[:, -K]
    found = []
    for logits_V, floor in zip(logits_TV, floor_T, strict=True):
        above = np.arange(V) if np.isnan(floor) else np.flatnonzero(logits_V >= floor)
        found.append(above[np.argpartition(logits_V[above], -K)[-K:]])
    return np.stack(found)


def log_probabilities(logits_TV: Logits, id_TK: NDArray[np.int64]) -> Floats:
    """Return the log probabilities of some tokens, which should be the likely ones.

    Exponentials of the others stay in the type of the logits, three times as fast as in float64:
    in float32 the results are off by at most 1e-7 of their mass.
    """
    most_T1 = logits_TV.max(1, keepdims=True)
    other_TV = np.exp(logits_TV - most_T1)
    np.put_along_axis(other_TV, id_TK, 0, axis=1)

    chosen_TK = np.take_along_axis(logits_TV, id_TK, 1).astype(np.float64) - most_T1
    sum_T = np.exp(chosen_TK).sum(1) + other_TV.sum(1, dtype=np.float64)
    return np.asarray(chosen_TK - np.log(sum_T)[:, None])

"""Measure what the checks decide on: answers, token ids, logits. Knows no limits."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.backends import Completion, Engine, EngineSettings, Sampling, ThinkingBudget
from racdeploy.recipe import Verification
from racdeploy.report_model import PositionRow, Record
from racdeploy.runtime.loops import find_loop
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, prompt_state, split
from racdeploy.tasks import Problem, Task, extract_answer
from racdeploy.verify import LogitComparison, TokenProbe

__all__ = ["answer_problems", "compare_logits", "fingerprint", "probe_tokens"]

Opener = Callable[[], AbstractContextManager[Engine]]
Progress = Callable[[str, int, int], None]
_ROWS = 64
_STRETCHES = 48


def answer_problems(
    engine: Engine,
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: tuple[int, ...],
    problems: Sequence[Problem],
    tasks: Mapping[str, Task],
    settings: Verification,
    arm: str,
    progress: Progress | None = None,
) -> tuple[tuple[Record, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Answer every problem on one engine, as often as the settings say.

    Returns:
        One record per problem and sample, and (prompt ids, completion ids) of each.
    """
    once = [tuple(encoder.encode(problem.question)) for problem in problems]
    prompts = [ids for ids in once for _ in range(settings.samples)]
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids,
        temperature=settings.temperature,
        seed=settings.seed,
        budget=_budget(tags, prompts, settings),
    )
    done: set[int] = set()

    def on_tokens(index: int, ids: Sequence[int]) -> None:
        if progress and ids and ids[-1] in stop_ids and index not in done:
            done.add(index)
            progress(f"verify {arm}", len(done), len(prompts))

    completions = engine.generate(prompts, sampling, on_tokens)
    if progress:
        progress(f"verify {arm}", len(prompts), len(prompts))
    records = tuple(
        _record(place, settings.samples, problems, prompts[place], done, encoder, tags, stop_ids, tasks, arm)
        for place, done in enumerate(completions)
    )
    return records, [(p, c.ids) for p, c in zip(prompts, completions, strict=True)]


def probe_tokens(engine: Engine, encoder: PromptEncoder, texts: Sequence[str]) -> tuple[TokenProbe, ...] | None:
    """Tokenize hard texts with the engine and with the checkpoint's own tokenizer; None if the engine has none."""
    try:
        found = [tuple(engine.tokenize(text)) for text in texts]
    except NotImplementedError:
        return None
    return tuple(TokenProbe(t, tuple(encoder.encode_text(t)), ids) for t, ids in zip(texts, found, strict=True))


def compare_logits(
    pruned: Opener, dense: Opener, artifact: Opener, traces: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> LogitComparison | None:
    """Run the dense model's traces through three models; None where there are no traces.

    One model is in memory at a time; the logits of the pruned one wait on disk.

    Args:
        pruned: opens the pruned checkpoint under torch.
        dense: opens the dense checkpoint under torch.
        artifact: opens the exported file on its engine.
        traces: prompt ids and completion ids of each.
    """
    if not traces:
        return None
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{index}.npy" for index in range(len(traces))]
        with pruned() as engine:
            for file, trace in zip(files, traces, strict=True):
                np.save(file, _completion_logits(engine, trace))
        with dense() as engine:
            pruning = [_compare(_completion_logits(engine, t), np.load(f)) for f, t in zip(files, traces, strict=True)]
        with artifact() as engine:
            export = [_compare(np.load(f), _completion_logits(engine, t)) for f, t in zip(files, traces, strict=True)]
    tokens = sum(len(kl) for kl, _ in export)
    (export_kl, export_top1), (pruning_kl, pruning_top1) = (
        [float(np.concatenate(part).mean()) for part in zip(*pairs, strict=True)] for pairs in (export, pruning)
    )
    along = _along([kl for kl, _ in export], [kl for kl, _ in pruning])
    return LogitComparison(tokens, export_kl, export_top1, pruning_kl, pruning_top1, along)


def fingerprint(settings: EngineSettings) -> dict[str, Any]:
    """Return the versions, machine and engine settings that results depend on."""
    packages = ("racdeploy", "torch", "transformers", "llama-cpp-python", "onnxruntime", "gguf", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "engine": asdict(settings),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _completion_logits(engine: Engine, trace: tuple[tuple[int, ...], tuple[int, ...]]) -> NDArray[np.float32]:
    """Return logits_TV that predict the completion's tokens."""
    prompt, completion = trace
    return engine.logits(prompt + completion)[len(prompt) - 1 : -1]


def _compare(
    reference_TV: NDArray[np.float32], other_TV: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return KL(reference ‖ other) in nats and top-1 agreement at every position, in chunks of rows."""
    kl, same = [], []
    for start in range(0, len(reference_TV), _ROWS):
        left_TV, right_TV = (_log_softmax(part[start : start + _ROWS]) for part in (reference_TV, other_TV))
        kl.append((np.exp(left_TV) * (left_TV - right_TV)).sum(1))
        same.append(left_TV.argmax(1) == right_TV.argmax(1))
    return np.concatenate(kl), np.concatenate(same)


def _along(export: Sequence[NDArray[np.float64]], pruning: Sequence[NDArray[np.float64]]) -> tuple[PositionRow, ...]:
    """Average the divergences of all traces over stretches of equal width, counted from the end of the prompt."""
    longest = max(map(len, export))
    width = -(-longest // _STRETCHES)
    rows = []
    for start in range(0, longest, width):
        parts = [[kl[start : start + width] for kl in arm] for arm in (export, pruning)]
        export_kl, pruning_kl = (np.concatenate(part) for part in parts)
        rows.append(
            PositionRow(
                start_token=start,
                stop_token=min(start + width, longest),
                tokens=len(export_kl),
                export_kl_nats=float(export_kl.mean()),
                pruning_kl_nats=float(pruning_kl.mean()),
            )
        )
    return tuple(rows)


def _record(
    place: int,
    samples: int,
    problems: Sequence[Problem],
    prompt: Sequence[int],
    done: Completion,
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: tuple[int, ...],
    tasks: Mapping[str, Task],
    arm: str,
) -> Record:
    index, sample = divmod(place, samples)
    problem = problems[index]
    parts = split(prompt, done.ids, tags, eos_ids=stop_ids, forced_at=done.forced_at)
    loop = find_loop([token for token in done.ids if token not in stop_ids])
    answer = encoder.decode(parts.answer_ids)
    closed = parts.state != "open"  # an unclosed thought is wrong, whatever it mentions
    return Record(
        prompt=index,
        task=problem.task,
        question=problem.question,
        gold=problem.gold,
        arm=arm,
        sample=sample,
        thinking_tokens=len(parts.thinking_ids),
        answer_tokens=len(parts.answer_ids),
        state=parts.state,
        opening=parts.opening,
        loop_tokens=loop.tokens if loop else 0,
        finish_reason=done.finish_reason,
        correct=closed and tasks[problem.task].score(answer, problem.gold),
        extracted=extract_answer(answer) if closed else None,
        answer_text=answer,
        thinking_text=encoder.decode(parts.thinking_ids),
        prompt_ids=tuple(prompt),
    )


def _budget(
    tags: ThinkingTags | None, prompts: Sequence[Sequence[int]], settings: Verification
) -> ThinkingBudget | None:
    if not settings.max_thinking_tokens or tags is None or not prompts:
        return None
    return ThinkingBudget(
        close_ids=tags.close_ids,
        open_ids=tags.open_ids,
        max_tokens=settings.max_thinking_tokens,
        starts_open=prompt_state(prompts[0], tags) == "open",
    )


def _log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    return np.asarray(shifted_TV - np.log(np.exp(shifted_TV).sum(1, keepdims=True)))

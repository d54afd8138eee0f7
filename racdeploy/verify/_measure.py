"""Measure what the checks decide on: answers, token ids, logits. Knows no limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from racdeploy.backends import Completion, Engine, Sampling, ThinkingBudget
from racdeploy.recipe import Verification
from racdeploy.report_model import Record
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, prompt_state, split
from racdeploy.tasks import Problem, Task, extract_answer
from racdeploy.verify import LogitComparison, TokenProbe

__all__ = ["answer_problems", "compare_logits", "probe_tokens"]

Progress = Callable[[str, int, int], None]


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
    """Answer every problem on one engine.

    Returns:
        One record per problem, and (prompt ids, completion ids) of each.
    """
    prompts = [tuple(encoder.encode(problem.question)) for problem in problems]
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
        _record(index, problem, prompts[index], completions[index], encoder, tags, stop_ids, tasks, arm)
        for index, problem in enumerate(problems)
    )
    return records, [(p, c.ids) for p, c in zip(prompts, completions, strict=True)]


def probe_tokens(engine: Engine, encoder: PromptEncoder, texts: Sequence[str]) -> tuple[TokenProbe, ...]:
    """Tokenize hard texts with the engine and with the checkpoint's own tokenizer."""
    return tuple(TokenProbe(text, tuple(encoder.encode_text(text)), tuple(engine.tokenize(text))) for text in texts)


def compare_logits(
    artifact: Engine,
    pruned: Engine,
    dense: Engine,
    traces: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
) -> LogitComparison | None:
    """Run the dense model's traces through three models; None where there are no traces.

    Args:
        artifact: the exported file on its engine.
        pruned: the pruned checkpoint under torch.
        dense: the dense checkpoint under torch.
        traces: prompt ids and completion ids of each.
    """
    export_kl, export_same, pruning_kl, pruning_same = ([] for _ in range(4))
    for prompt, completion in traces:
        first = len(prompt) - 1
        rows = [engine.logits(prompt + completion)[first:-1] for engine in (artifact, pruned, dense)]
        exported_TV, pruned_TV, dense_TV = map(_log_softmax, rows)
        export_kl.append(_divergence(pruned_TV, exported_TV))
        pruning_kl.append(_divergence(dense_TV, pruned_TV))
        export_same.append(pruned_TV.argmax(1) == exported_TV.argmax(1))
        pruning_same.append(dense_TV.argmax(1) == pruned_TV.argmax(1))
    if not traces:
        return None
    means = [float(np.concatenate(v).mean()) for v in (export_kl, export_same, pruning_kl, pruning_same)]
    return LogitComparison(sum(map(len, export_kl)), *means)


def _record(
    index: int,
    problem: Problem,
    prompt: Sequence[int],
    done: Completion,
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: tuple[int, ...],
    tasks: Mapping[str, Task],
    arm: str,
) -> Record:
    parts = split(prompt, done.ids, tags, eos_ids=stop_ids, forced_at=done.forced_at)
    answer = encoder.decode(parts.answer_ids)
    closed = parts.state != "open"  # an unclosed thought is wrong, whatever it mentions
    return Record(
        prompt=index,
        task=problem.task,
        question=problem.question,
        gold=problem.gold,
        arm=arm,
        thinking_tokens=len(parts.thinking_ids),
        answer_tokens=len(parts.answer_ids),
        state=parts.state,
        finish_reason=done.finish_reason,
        correct=closed and tasks[problem.task].score(answer, problem.gold),
        extracted=extract_answer(answer) if closed else None,
        answer_text=answer,
        thinking_text=encoder.decode(parts.thinking_ids),
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


def _divergence(reference_TV: NDArray[np.float64], other_TV: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(reference ‖ other) in nats at every position."""
    return np.asarray((np.exp(reference_TV) * (reference_TV - other_TV)).sum(1))

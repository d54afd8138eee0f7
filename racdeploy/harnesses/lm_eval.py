"""lm-evaluation-harness of EleutherAI, through ``local-chat-completions``; read as of 0.4.13.

It sends chats, so tasks that compare likelihoods are refused by it. It sees ``content`` alone: the
answer without the thinking. It logs every document, and keeps answers by request in a cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import split_lines
from racdeploy.harnesses import Order, Score

PACKAGE = "lm_eval"
INSTALL = '"lm_eval[api]==0.4.13"'
_STDERR = "_stderr"


def arguments(order: Order) -> list[str]:
    """Return a greedy run that logs every document."""
    model = {
        "base_url": f"{order.url}/chat/completions",
        "model": order.model,
        "num_concurrent": order.parallel,
        "max_retries": 3,
        "timeout": 86_400,  # a thought may take long; a server that ended is noticed at once
    }
    generation = {"max_gen_toks": order.max_new_tokens, "temperature": 0, "do_sample": False}

    chosen = ["lm_eval", "run", "--tasks", ",".join(order.tasks)]
    chosen += ["--model", "local-chat-completions", "--model_args", json.dumps(model)]
    chosen += ["--gen_kwargs", json.dumps(generation)]
    chosen += ["--apply_chat_template", "--log_samples", "--output_path", str(order.out)]
    chosen += ["--use_cache", str(order.out / "cache")]

    if order.limit:
        chosen += ["--limit", str(order.limit)]
    if order.include:
        chosen += ["--include_path", str(order.include)]
    return chosen


def read(out: Path, python: Path) -> list[Score]:
    """Return every metric of every task, and of groups of tasks."""
    found = sorted(out.glob("*/results_*.json"))
    if not found:
        return []

    results = read_json(found[-1])
    written = found[-1].stem.removeprefix("results_")
    counts = {task: count["effective"] for task, count in results["n-samples"].items()}

    scores = []
    for task, values in results["results"].items():
        samples = _read_samples(found[-1].with_name(f"samples_{task}_{written}.jsonl"))
        better = results["higher_is_better"].get(task, {})

        for key, value in _list_metrics(values):
            metric, _, step = key.partition(",")
            error = values.get(f"{metric}{_STDERR},{step}")
            scores.append(
                Score(
                    task=task,
                    metric=metric if step == "none" else key,
                    value=value,
                    documents=_count(task, counts, results["group_subtasks"]),
                    stderr=error if isinstance(error, float) else None,
                    larger_is_better=better.get(metric) is not False,
                    samples=_take(samples, metric, step),
                )
            )

    return scores


def _list_metrics(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield ``METRIC,FILTER`` with its value."""
    for key, value in values.items():
        metric, _, step = key.partition(",")
        if step and not metric.endswith(_STDERR) and isinstance(value, int | float):
            yield key, float(value)


def _count(task: str, counts: Mapping[str, int], groups: Mapping[str, list[str]]) -> int:
    """Return the documents of a task, or of all tasks of a group."""
    if task in counts:
        return counts[task]
    return sum(_count(part, counts, groups) for part in groups.get(task, ()))


def _read_samples(file: Path) -> list[Json]:
    """Return the log of a task; a group has none."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in split_lines(file.read_text(encoding="utf-8"))]


def _take(samples: list[Json], metric: str, step: str) -> dict[str, float]:
    """Return a metric by document; nothing where it is no number of every document."""
    lines = [line for line in samples if line.get("filter") == step]
    if not all(isinstance(line.get(metric), int | float) for line in lines):
        return {}
    return {f"{line['doc_id']} {line['doc_hash']}": float(line[metric]) for line in lines}

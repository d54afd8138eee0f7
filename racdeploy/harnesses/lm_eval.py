"""lm-evaluation-harness by EleutherAI, through ``local-chat-completions``; tested with 0.4.13.

It sends chats, so it refuses tasks that compare likelihoods. It sees ``content`` alone: the answer
without the thinking. It logs every document, and caches answers by request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import split_lines
from racdeploy.harnesses import HarnessRequest, HarnessScore

PACKAGE = "lm_eval"
INSTALL = '"lm_eval[api]==0.4.13"'
_STDERR = "_stderr"


def arguments(order: HarnessRequest) -> list[str]:
    """Return the arguments of a greedy run that logs every document."""
    model = {
        "base_url": f"{order.url}/chat/completions",
        "model": order.model,
        "num_concurrent": order.parallel,
        "max_retries": 3,
        "timeout": 86_400,  # a long thought takes hours; a stopped server is noticed at once
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


def read(out: Path, python: Path) -> list[HarnessScore]:
    """Return every metric of every task, and of groups of tasks."""
    files = sorted(out.glob("*/results_*.json"))
    if not files:
        return []

    # Names end in the time of writing: the last one is of this run, after an interrupted one.
    results = read_json(files[-1])
    timestamp = files[-1].stem.removeprefix("results_")
    counts = {task: count["effective"] for task, count in results["n-samples"].items()}

    scores = []
    for task, values in results["results"].items():
        samples = _read_samples(files[-1].with_name(f"samples_{task}_{timestamp}.jsonl"))
        better = results["higher_is_better"].get(task, {})

        for key, value in _list_metrics(values):
            metric, _, filter_name = key.partition(",")
            error = values.get(f"{metric}{_STDERR},{filter_name}")
            scores.append(
                HarnessScore(
                    task=task,
                    metric=metric if filter_name == "none" else key,
                    value=value,
                    documents=_count_documents(task, counts, results["group_subtasks"]),
                    stderr=error if isinstance(error, float) else None,
                    larger_is_better=better.get(metric) is not False,
                    by_document=_collect_metric(samples, metric, filter_name),
                )
            )

    return scores


def _list_metrics(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield ``METRIC,FILTER`` and its value, without standard errors."""
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if filter_name and not metric.endswith(_STDERR) and isinstance(value, int | float):
            yield key, float(value)


def _count_documents(task: str, counts: Mapping[str, int], groups: Mapping[str, list[str]]) -> int:
    """Return the number of documents of a task, or of all tasks of a group."""
    if task in counts:
        return counts[task]
    return sum(_count_documents(subtask, counts, groups) for subtask in groups.get(task, ()))


def _read_samples(file: Path) -> list[Json]:
    """Return the logged documents of a task; empty for a group, which has no log."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in split_lines(file.read_text(encoding="utf-8"))]


def _collect_metric(samples: list[Json], metric: str, filter_name: str) -> dict[str, float]:
    """Return a metric by document; empty if some document has no number for it."""
    lines = [line for line in samples if line.get("filter") == filter_name]
    if not all(isinstance(line.get(metric), int | float) for line in lines):
        return {}
    return {f"{line['doc_id']} {line['doc_hash']}": float(line[metric]) for line in lines}

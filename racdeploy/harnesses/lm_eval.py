"""lm-evaluation-harness by EleutherAI, through ``local-chat-completions``; tested with 0.4.13.

It sends chats, so it refuses tasks that compare likelihoods. It sees ``content`` alone: the answer
without the thinking. It logs every document, and caches answers by request.
"""

from __future__ import annotations

import json
from pathlib import Path

from racdeploy.files.reading import read_json
from racdeploy.files.writing import split_lines
from racdeploy.harnesses import HarnessRequest, HarnessScore, find_results

PACKAGE = "lm_eval"
INSTALL = '"lm_eval[api]==0.4.13"'


def arguments(order: HarnessRequest) -> list[str]:
    """Return the arguments of a greedy run that logs every document."""
    model = {
        "base_url": f"{order.url}/chat/completions",
        "model": order.model,
        "num_concurrent": order.settings.parallel,
        "max_retries": 3,
        "timeout": 86_400,  # a long thought takes hours; a stopped server is noticed at once
    }
    generation = {
        "max_gen_toks": order.settings.max_new_tokens,
        "temperature": 0,
        "do_sample": False,
    }

    chosen = ["lm_eval", "run", f"--tasks={','.join(order.settings.tasks)}"]
    chosen += ["--model=local-chat-completions", f"--model_args={json.dumps(model)}"]
    chosen += [f"--gen_kwargs={json.dumps(generation)}", "--apply_chat_template", "--log_samples"]
    chosen += [f"--output_path={order.out}", f"--use_cache={order.out / 'cache'}"]
    if order.settings.limit:
        chosen += ["--limit", str(order.settings.limit)]
    if order.include:
        chosen.append(f"--include_path={order.include}")
    return chosen


def read(out: Path, python: Path) -> list[HarnessScore]:
    """Return every metric of every task, and of groups of tasks, which have no log."""
    file, timestamp = find_results(out)
    results = read_json(file)

    scores = []
    for task, values in results["results"].items():
        log = file.with_name(f"samples_{task}_{timestamp}.jsonl")
        text = log.read_text(encoding="utf-8") if log.is_file() else ""
        samples = [json.loads(line) for line in split_lines(text)]
        better = results["higher_is_better"].get(task, {})

        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            by_document = {
                f"{line['doc_id']} {line['doc_hash']}": line.get(metric)
                for line in samples
                if line["filter"] == filter_name
            }
            name = metric if filter_name == "none" else key
            scores.append(
                HarnessScore(
                    task=task,
                    metric=name,
                    value=value,
                    documents=values["sample_len"],
                    stderr=values.get(f"{metric}_stderr,{filter_name}"),
                    larger_is_better=better.get(metric) is not False,
                    by_document=by_document,
                )
            )

    return scores

"""lighteval by Hugging Face, through litellm and OpenAI's API; tested with 0.13.0.

It receives the thinking apart from the answer, and scores the answer alone. Its details are parquet
files, which its own Python reads. Its caches are placed in the folder of the run: the default ones
are shared by all runs, and hold the answers of any model with the same name.
"""

from __future__ import annotations

import json
from pathlib import Path

from racdeploy.files.reading import read_json
from racdeploy.files.writing import split_lines
from racdeploy.harnesses import HarnessRequest, HarnessScore, find_results, run_python

PACKAGE = "lighteval"
# litellm 1.80 and later lack the cache that lighteval asks for, xxhash 4 takes no text.
INSTALL = '"lighteval[litellm]==0.13.0" "litellm<1.80" "xxhash<4"'
_READ_DETAILS = """
import json, sys
import pyarrow.parquet
for name in sys.argv[1:]:
    for row in pyarrow.parquet.read_table(name, columns=["doc", "metric"]).to_pylist():
        doc = row["doc"]
        line = {"task": doc["task_name"], "id": [doc["id"], doc["query"]], "metric": row["metric"]}
        print(json.dumps(line))
"""


def arguments(order: HarnessRequest) -> list[str]:
    """Return the arguments of a greedy run that logs every document."""
    model = {
        "model_name": f"openai/{order.model}",
        "provider": "openai",
        "base_url": order.url,
        "api_key": "none",
        "concurrent_requests": order.settings.parallel,
        "max_model_length": order.settings.context_tokens,
        "api_max_retry": 3,
        "cache_dir": str(order.out / "cache"),
        "generation_parameters": {
            "temperature": 0.0,
            "max_new_tokens": order.settings.max_new_tokens,
        },
    }
    file = order.out / "model.yaml"  # JSON is YAML
    file.write_text(json.dumps({"model_parameters": model}, indent=1), encoding="utf-8")

    tasks = []
    for task in order.settings.tasks:
        tasks.append(task if "|" in task else f"{task}|0")  # 0 worked examples
    chosen = ["lighteval", "endpoint", "litellm", str(file), ",".join(tasks)]
    chosen += [f"--output-dir={order.out}", "--save-details"]

    if order.settings.limit:
        chosen += ["--max-samples", str(order.settings.limit)]
    if order.include:
        chosen.append(f"--custom-tasks={order.include}")
    return chosen


def read(out: Path, python: Path) -> list[HarnessScore]:
    """Return every metric of every task."""
    file, timestamp = find_results(out)
    results = read_json(file)
    files = out.rglob(f"details_*_{timestamp}.parquet")
    text = run_python(python, _READ_DETAILS, *sorted(files))
    details = [json.loads(line) for line in split_lines(text)]

    scores = []
    for task, values in results["results"].items():
        lines = [line for line in details if line["task"] == task]
        metrics = results["config_tasks"].get(task, {}).get("metrics", ())
        better = {each["metric_name"]: each["higher_is_better"] for each in metrics}

        for metric, value in values.items():
            if task == "all" or metric.endswith("_stderr"):  # all: the mean over tasks
                continue
            by_document = {json.dumps(line["id"]): line["metric"].get(metric) for line in lines}
            scores.append(
                HarnessScore(
                    task=task.removesuffix("|0"),
                    metric=metric,
                    value=value,
                    documents=len(lines),
                    stderr=values.get(f"{metric}_stderr"),
                    larger_is_better=better.get(metric) is not False,
                    by_document=by_document,
                )
            )

    return scores

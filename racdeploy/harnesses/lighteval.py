"""lighteval by Hugging Face, through litellm and OpenAI's API; tested with 0.13.0.

It receives the thinking apart from the answer, and scores the answer alone. Its details are parquet
files, which its own Python reads. Its caches are placed in the folder of the run: the default ones
are shared by all runs, and hold the answers of any model with the same name.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from racdeploy.errors import EnvironmentFailure
from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import split_lines
from racdeploy.harnesses import HarnessRequest, HarnessScore

PACKAGE = "lighteval"
# litellm 1.80 and later lack the cache that lighteval asks for, xxhash 4 takes no text.
INSTALL = '"lighteval[litellm]==0.13.0" "litellm<1.80" "xxhash<4"'
_ALL = "all"  # the mean over tasks, which is not a task
_STDERR = "_stderr"
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
        "concurrent_requests": order.parallel,
        "max_model_length": order.context_tokens,
        "api_max_retry": 3,
        "cache_dir": str(order.out / "cache"),
        "generation_parameters": {"temperature": 0.0, "max_new_tokens": order.max_new_tokens},
    }
    settings = order.out / "model.yaml"  # JSON is YAML
    settings.write_text(json.dumps({"model_parameters": model}, indent=1), encoding="utf-8")

    tasks = [task if "|" in task else f"{task}|0" for task in order.tasks]
    chosen = ["lighteval", "endpoint", "litellm", str(settings), ",".join(tasks)]
    chosen += ["--output-dir", str(order.out), "--save-details"]

    if order.limit:
        chosen += ["--max-samples", str(order.limit)]
    if order.include:
        chosen += ["--custom-tasks", str(order.include)]
    return chosen


def read(out: Path, python: Path) -> list[HarnessScore]:
    """Return every metric of every task."""
    files = sorted(out.glob("results/**/results_*.json"), key=lambda file: file.name)
    if not files:
        return []

    # Names end in the time of writing: the last one is of this run, after an interrupted one.
    results = read_json(files[-1])
    timestamp = files[-1].stem.removeprefix("results_")
    details = _read_details(sorted(out.glob(f"details/**/details_*_{timestamp}.parquet")), python)

    scores = []
    for task, values in results["results"].items():
        if task == _ALL:
            continue

        lines = [line for line in details if line["task"] == task]
        metrics = results["config_tasks"].get(task, {}).get("metrics", ())
        better = {each["metric_name"]: each["higher_is_better"] for each in metrics}

        for metric, value in values.items():
            if metric.endswith(_STDERR):
                continue
            scores.append(
                HarnessScore(
                    task=task.removesuffix("|0"),
                    metric=metric,
                    value=float(value),
                    documents=len(lines),
                    stderr=values.get(f"{metric}{_STDERR}"),
                    larger_is_better=better.get(metric) is not False,
                    by_document=_collect_metric(lines, metric),
                )
            )

    return scores


def _read_details(files: list[Path], python: Path) -> list[Json]:
    """Return one object for each document: its task, id and metrics."""
    command = [str(python), "-P", "-c", _READ_DETAILS, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise EnvironmentFailure(
            "harness-details-unreadable", f"the details that lighteval wrote cannot be read: {last}"
        )

    return [json.loads(line) for line in split_lines(done.stdout)]


def _collect_metric(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Return a metric by document; empty if some document has no number for it."""
    if not all(isinstance(line["metric"].get(metric), int | float) for line in lines):
        return {}
    return {json.dumps(line["id"]): float(line["metric"][metric]) for line in lines}

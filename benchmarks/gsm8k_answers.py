"""Record what a model answers to GSM8K's questions, for benchmarks/extractors.py.

    racdeploy export MODEL --quant q8_0 --out model.gguf
    python -m benchmarks.gsm8k_answers MODEL model.gguf gsm8k:test.jsonl --out answers.jsonl

Asks as ``--tasks gsm8k`` does, greedily, with llama.cpp. One line per question holds its number in
the file, the gold number and the answer, and nothing of GSM8K's own text. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from racdeploy import tasks
from racdeploy.engines import open_engine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import EngineSettings
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Verification
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.verification.answer_sampler import AnswerSampler


def main() -> None:
    """Ask the first questions of a file, and write the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder of its tokenizer")
    parser.add_argument("artifact", type=Path, help="the GGUF file")
    parser.add_argument("task", help="gsm8k:FILE")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    encoder = PromptEncoder.from_folder(arguments.model)
    asked = Verification(
        max_new_tokens=arguments.max_new_tokens,
        context_tokens=1024,
        parallel=arguments.parallel,
    )
    settings = EngineSettings(asked.context_tokens, asked.parallel, arguments.threads)
    stop_ids = Checkpoint(arguments.model).eos_ids
    sampler = AnswerSampler(encoder, find_tags(encoder), stop_ids, asked, progress=Progress())

    log = CompletionLog(arguments.out.with_suffix(".completions"))
    problems = tasks.load(arguments.task).pool[: arguments.count]
    answers = sampler.answer(
        lambda: open_engine("llamacpp", arguments.artifact, settings), problems, "model", log
    )

    lines = []
    for record in answers.records:
        row = {"index": record.prompt, "gold": record.gold, "answer": record.answer_text}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    arguments.out.write_text("".join(lines), encoding="utf-8")


class Progress:
    """Prints a line every half minute."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def __call__(self, label: str, done: int, total: int, tokens: int = 0, /) -> None:
        """Say how many are answered, and the tokens so far."""
        if time.monotonic() >= self._next_s:
            print(f"{label}: {done} of {total}, {tokens} tokens", flush=True)
            self._next_s = time.monotonic() + 30


if __name__ == "__main__":
    main()

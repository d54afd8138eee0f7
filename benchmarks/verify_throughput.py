"""Tokens per second of verification against one prompt at a time through
``Llama.create_completion``, in one run.

Both load the same file with the same context, cache and threads, and answer the same prompts
greedily; rounds alternate.

    python benchmarks/verify_throughput.py --prompts 64 --rounds 3 --parallel 8 16

AMD EPYC (Zen 5), 2 cores, tiny-reasoner as Q8_0, 2026-11: one at a time 3,842 tokens/s, 8 at once
11,895 (3.10 times), 16 at once 11,758 (3.06 times), the same text for all 64 prompts. Nine tenths
of the time are llama.cpp's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from racdeploy import scorers
from racdeploy.decoding.engine import EngineSettings
from racdeploy.engines import open_engine
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.storage.caches import default_work
from racdeploy.verify.answers import Answers, Respondent


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--parallel", type=int, nargs="+", default=[16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    verify = {"count": arguments.prompts, "max_new_tokens": 768, "context_tokens": 1024}
    recipe = Recipe.combine(
        None, {"model": arguments.model, "export": {"quant": arguments.quant}, "verify": verify}
    )
    build = Build(Job(recipe), default_work())
    artifact = build.export(build.job.model.folder, "dense", pruned=False).path
    alone = OneByOne(artifact, build.job, arguments.threads)
    rates: dict[str, list[float]] = {}
    found: dict[str, Answers] = {}
    for _ in range(arguments.rounds):
        rates.setdefault("create_completion", []).append(alone.run())
        for parallel in arguments.parallel:
            name = f"racdeploy, {parallel} at once"
            rate, found[name] = together(artifact, build.job, parallel, arguments.threads)
            rates.setdefault(name, []).append(rate)
    base = statistics.median(rates["create_completion"])
    rows = []
    for name, values in rates.items():
        row: dict[str, Any] = {
            "how": name,
            "tokens_per_s": round(statistics.median(values)),
            "rounds": len(values),
        }
        row["ratio"] = round(statistics.median(values) / base, 2)
        if name in found:
            row |= alone.compare(found[name])
        rows.append(row)
        print(json.dumps(row))


def together(artifact: Path, job: Job, parallel: int, threads: int) -> tuple[float, Answers]:
    """Answer as a verification does; loading is not counted, handing answers over and scoring them
    is.
    """
    settings = job.recipe.verify
    respondent = Respondent(job.encoder, job.tags, job.checkpoint.eos_ids, settings)
    opened = open_engine(
        "llamacpp", artifact, EngineSettings(settings.context_tokens, parallel, threads)
    )
    with closing(opened) as engine:
        started = time.perf_counter()
        answers = respondent.answer(lambda: Kept(engine), job.problems("evaluation"), "dense")
        elapsed_s = time.perf_counter() - started
    return sum(len(completion) for _, completion in answers.traces) / elapsed_s, answers


class Kept:
    """An engine that stays open."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __enter__(self) -> Any:
        return self._engine

    def __exit__(self, *_: object) -> None:
        pass


class OneByOne:
    """llama-cpp-python's high-level interface."""

    def __init__(self, artifact: Path, job: Job, threads: int) -> None:
        from llama_cpp import Llama

        self._job = job
        self._texts: list[str] = []
        self._model = Llama(
            str(artifact),
            n_ctx=job.recipe.verify.context_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            flash_attn=False,
            verbose=False,
        )

    def run(self) -> float:
        """Answer every prompt; return tokens per second."""
        problems, settings = self._job.problems("evaluation"), self._job.recipe.verify
        tokens, self._texts = 0, []
        started = time.perf_counter()
        for problem in problems:
            done: Any = self._model.create_completion(
                self._job.encoder.encode(problem.question),
                max_tokens=settings.max_new_tokens,
                temperature=0.0,
            )
            tokens += done["usage"]["completion_tokens"]
            self._texts.append(done["choices"][0]["text"])
        return tokens / (time.perf_counter() - started)

    def compare(self, answers: Answers) -> dict[str, Any]:
        """Count equal texts, special tokens left out, and equal final answers."""
        special = set(self._job.encoder.tokenizer.get_added_ids())
        texts = [self._plain(ids, special) for _, ids in answers.traces]
        pairs = list(zip(self._texts, answers.records, strict=True))
        same = [
            scorers.score("", text, record.gold).extracted == record.extracted
            for text, record in pairs
        ]
        equal = [a.strip() == b.strip() for a, b in zip(texts, self._texts, strict=True)]
        return {"prompts": len(texts), "same_text": sum(equal), "same_answer": sum(same)}

    def _plain(self, ids: Sequence[int], special: set[int]) -> str:
        return self._job.encoder.decode([token for token in ids if token not in special])


if __name__ == "__main__":
    main()

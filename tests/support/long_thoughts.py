"""Compare two scripted models that think for long, in this process; print what was found.

python -m tests.support.long_thoughts WORK TOKENS
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

from racdeploy import plugins
from racdeploy.engines import backends
from racdeploy.engines.engine import EngineSettings
from racdeploy.models.sources import resolve_model
from racdeploy.recipe import Verification
from racdeploy.report.files import write_reports
from racdeploy.runtime.deployed import DeployedModel, find_model
from racdeploy.tasks import Problem
from racdeploy.verification.answer_cache import AnswerCache
from racdeploy.verification.compare import ModelComparison
from racdeploy.verification.examiner import Examiner
from racdeploy.verification.gate import read_gate
from tests.support import hold

PROMPTS = 6
_WORDS = "so we add both and check the sum once more then write it down as the result "


def main(work: Path, tokens: int) -> None:
    """Answer with both, and print figures as JSON."""
    backends.__path__.append(str(Path(__file__).parent / "scripted"))
    model = find_model(Path(resolve_model("tiny-reasoner").folder))
    problems = [
        Problem(f"What is {n} + {n}?", str(2 * n), task="sums") for n in range(1, PROMPTS + 1)
    ]
    room = tokens + 256
    settings = Verification(
        count=PROMPTS, max_new_tokens=room - 128, context_tokens=room, logit_traces=0
    )
    engine = EngineSettings(room, 1, 1)
    examiner = Examiner(
        problems, settings, read_gate(), AnswerCache(work, keeps=False), engine=engine
    )
    models = [
        _write_script(model, problems, work / f"{name}.json", tokens)
        for name in ("reference", "candidate")
    ]

    began_s = time.monotonic()
    ((report, records),) = ModelComparison(models[0], (models[1],), ("sums",), examiner).run()
    lasted_s = time.monotonic() - began_s
    write_reports(work / "reports", report, records, "candidate")
    thinking = report.find_check("thinking")
    assert thinking
    found = {
        "generated": sys.modules["racdeploy.engines.backends.thinker"].generated,
        "verdict": thinking.verdict,
        "figures": thinking.figures,
        "lengths": [record.thinking_tokens for record in records],
        "correct": [record.correct for record in records],
        "us_per_token": 1e6 * lasted_s / (2 * PROMPTS * tokens),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "page_bytes": (work / "reports" / "report.html").stat().st_size,
    }
    print(json.dumps(found))


def _write_script(
    model: DeployedModel, problems: list[Problem], file: Path, tokens: int
) -> DeployedModel:
    """Return the embedded model's tokenizer and template with a scripted engine."""
    encoder, tags = model.encoder, model.tags
    assert tags
    is_candidate = file.stem == "candidate"
    words = encoder.encode_text(_WORDS)
    answers = {
        str(encoder.encode(problem.question)): [
            *tags.close_ids,
            *encoder.encode_text(f"The answer is {problem.gold}."),
            *model.settings.tokenizer.eos_ids[:1],
        ]
        for problem in problems
    }
    # The reference counts on; the candidate repeats itself until its tokens run out.
    thought = list(words)
    number = 0
    while not is_candidate and len(thought) < tokens:
        number += 1
        thought += encoder.encode_text(f"{number} and {number * 7} is {number * 8}, ")
    thought = thought[:tokens]
    script = {
        "vocabulary": encoder.tokenizer.get_vocab_size(),
        "thought": thought,
        "answers": {} if is_candidate else answers,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(script))
    entry = model.entry.model_copy(update={"backend": "thinker"})
    generation = model.settings.generation.model_copy(update={"model_context_tokens": None})
    settings = replace(model.settings, name=file.name, artifact=entry, generation=generation)
    return replace(model, settings=settings, manifest=None, path=file, files=(file,))


if __name__ == "__main__":
    hold.install()
    plugins.list_names.cache_clear()
    main(Path(sys.argv[1]), int(sys.argv[2]))

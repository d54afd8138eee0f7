"""Does verification cry wolf? The dense model against itself, on other engines and in F16, over
many seeds.

Each seed draws other prompts, as many as the standard tier asks. Nothing was pruned, so no check
may fail; what is counted is how often one fails or cannot decide.

    python benchmarks/false_alarms.py --seeds 20
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from racdeploy.engines import open_engine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import EngineSettings
from racdeploy.files.caches import default_work_folder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.verification.answer_sampler import AnswerSampler
from racdeploy.verification.checks import accuracy, backends, thinking
from racdeploy.verification.evidence import ArmResult, Evidence, OtherArtifact
from racdeploy.verification.gate import read_gate

OTHERS = {
    "llama.cpp F16": ("llamacpp", "gguf", "f16"),
    "onnxruntime F32": ("onnxruntime", "onnx", "f32"),
    "transformers F32": ("transformers", "", ""),
}


def main() -> None:
    """Answer, compare and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=read_gate().tiers.standard.prompts)
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    artifacts = {name: exported(arguments.model, *OTHERS[name][1:]) for name in arguments.others}
    main_artifact = exported(arguments.model, "gguf", "q8_0")
    counts: dict[str, Counter[str]] = {}
    for seed in range(arguments.seeds):
        verify = {
            "count": arguments.prompts,
            "seed": seed,
            "max_new_tokens": 768,
            "context_tokens": 1024,
        }
        job = Job(Recipe.combine(None, {"model": arguments.model, "verify": verify}))
        reference = answered(job, "llamacpp", main_artifact, "q8_0", arguments.threads)
        for name, artifact in artifacts.items():
            other = answered(job, OTHERS[name][0], artifact, OTHERS[name][2], arguments.threads)
            for check, verdict in compared(job, reference, other).items():
                counts.setdefault(f"{name}: {check}", Counter())[verdict] += 1
        print(json.dumps({"seeds": seed + 1, **counts}), flush=True)


def exported(model: str, form: str, quant: str) -> Path:
    """Return the dense model's artifact, or its folder."""
    if not form:
        return Job(Recipe.combine(None, {"model": model})).model.folder
    target = {"gguf": "gguf", "onnx": "onnx"}[form]
    job = Job(
        Recipe.combine(
            None, {"model": model, "target": target, "export": {"format": form, "quant": quant}}
        )
    )
    path = (
        Build(job, default_work_folder())
        .export(job.model.folder, f"dense-{quant}", pruned=False)
        .path
    )
    if form == "onnx":  # the engine reads the head size there
        shutil.copyfile(job.model.folder / "config.json", path.parent / "config.json")
    return path


def answered(job: Job, backend: str, artifact: Path, quant: str, threads: int) -> ArmResult:
    """Answer the problems of one seed."""
    settings = job.recipe.verify
    sampler = AnswerSampler(job.encoder, job.tags, job.checkpoint.eos_ids, settings)
    engine = EngineSettings(settings.context_tokens, 32, threads)
    problems = job.problems("evaluation")
    with TemporaryDirectory() as folder:
        log = CompletionLog(Path(folder) / "completions.jsonl")
        answers = sampler.answer(
            lambda: closing(open_engine(backend, artifact, engine)), problems, "dense", log
        )
    return ArmResult("dense", answers.records, 0, quant or "f32", 0.0)


def compared(job: Job, reference: ArmResult, other: ArmResult) -> dict[str, str]:
    """Return the verdicts: the other as a pruned arm, and as a second engine."""
    evidence = Evidence(
        job.recipe.verify,
        read_gate(),
        reference,
        other,
        Path(),
        {},
        0.0,
        backend="llamacpp",
        other_artifacts=(OtherArtifact(reference, "llamacpp", Path(), {}),),
    )
    checks = {"accuracy": accuracy, "thinking": thinking, "backends": backends}
    return {name: check.check(evidence).verdict for name, check in checks.items()}


if __name__ == "__main__":
    main()

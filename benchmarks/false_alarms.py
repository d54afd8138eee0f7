"""Does verification cry wolf? The dense model against itself, on other engines and in F16, over
many seeds; and simulated pairs of models through the same verdict.

Each seed draws other prompts, as many as the standard tier asks. Nothing was pruned, so no check
may fail; what is counted is how often one fails or cannot decide. A simulated model answers each
prompt right with a probability of its own, at a temperature, so that equal models disagree.

    python benchmarks/false_alarms.py --seeds 20
    python benchmarks/false_alarms.py --simulated 2000
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from racdeploy.engines import open_engine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import EngineSettings
from racdeploy.files.caches import default_work_folder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe, Verification
from racdeploy.recipe_settings import nest_settings
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import COMPARED_ROLES, Report
from racdeploy.verification.answer_sampler import AnswerSampler
from racdeploy.verification.checks import accuracy, backends, thinking
from racdeploy.verification.evidence import ArmResult, Evidence, OtherArtifact
from racdeploy.verification.gate import read_gate
from racdeploy.verification.plan import Expectation, plan_power
from racdeploy.verification.report_builder import build_report
from racdeploy.verification.stats.distributions import Floats
from racdeploy.verification.stats.group_sequential import Analysis

_UNCLOSED, _SPREAD = 0.01, 0.3  # endless thoughts of every model; spread of one prompt's lengths

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
    parser.add_argument("--simulated", type=int, default=0, help="pairs, in place of real runs")
    parser.add_argument("--samples", type=int, default=1, help="simulated answers to each prompt")
    arguments = parser.parse_args()
    if arguments.simulated:
        print_simulated(arguments.simulated, arguments.prompts, arguments.samples)
        return

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
        settings = nest_settings({"model": arguments.model, "verify": verify})
        job = Job(Recipe.combine(None, settings))
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
        settings=job.recipe.verify,
        gate=read_gate(),
        dense=reference,
        pruned=other,
        artifact=Path(),
        artifact_files={},
        requested_sparsity=0.0,
        backend="llamacpp",
        other_artifacts=(OtherArtifact(reference, "llamacpp", Path(), {}),),
    )
    checks = {"accuracy": accuracy, "thinking": thinking, "backends": backends}
    return {name: check.check(evidence).verdict for name, check in checks.items()}


@dataclass(frozen=True)
class Simulated:
    """Pairs of models that answer at a temperature.

    Args:
        lost: answers that the second loses, as a share of all.
        longer: its thinking lengths, as a multiple of the first's.
    """

    prompts: int = 200
    samples: int = 1
    lost: float = 0.0
    longer: float = 1.0

    def judge(self, seed: int) -> Report:
        """Return the report on one pair, by all checks that need no file."""
        generator = np.random.default_rng(seed)
        # Most prompts are always answered alike: about 10 % of the pairs disagree, as the plan of a
        # verification assumes.
        right_N = generator.beta(0.29, 0.072, self.prompts)
        mean_N = generator.gamma(6, 25, self.prompts)
        first = self._answer(generator, right_N, mean_N)
        kept_N = np.clip(right_N * (1 - self.lost / right_N.mean()), 0, 1)
        second = self._answer(generator, kept_N, mean_N * self.longer)
        settings = Verification(
            count=self.prompts, samples=self.samples, temperature=0.6, logit_traces=0
        )
        no_file = dict.fromkeys(
            ("backends", "integrity", "sparsity", "template", "tokens"), "simulated"
        )
        evidence = Evidence(
            settings=settings.with_limits(),
            gate=read_gate(),
            dense=first,
            pruned=second,
            skip_reasons=no_file,
            roles=COMPARED_ROLES,
        )
        report, _ = build_report(evidence, [], recipe={}, model="b", target="", reference="a")
        return report

    def _answer(self, generator: np.random.Generator, right_N: Floats, mean_N: Floats) -> ArmResult:
        records = []
        for index, (share, mean) in enumerate(zip(right_N, mean_N, strict=True)):
            for sample in range(self.samples):
                is_open = generator.random() < _UNCLOSED
                values = {
                    "prompt": index,
                    "sample": sample,
                    "task": "simulated",
                    "correct": not is_open and generator.random() < share,
                    "thinking_tokens": round(mean * generator.lognormal(0, _SPREAD)),
                    "answer_tokens": 4,
                    "state": "open" if is_open else "closed",
                    "finish_reason": "length" if is_open else "stop",
                }
                records.append(AnswerRecord.model_construct(**values))
        return ArmResult("dense", tuple(records))


def print_simulated(pairs: int, prompts: int, samples: int) -> None:
    """Print the shares of verdicts over equal pairs, pairs at the limits, and worse ones."""
    limits = read_gate().limits(accuracy.Limits).margin, read_gate().limits(thinking.Limits)
    margin, ratio = limits[0], limits[1].length_ratio
    settings = Verification(samples=samples, temperature=0.6)
    analysis = Analysis(prompts, read_gate().confidence)
    planned = plan_power(settings, read_gate(), Expectation(), [analysis])
    print(json.dumps({"planned": asdict(planned)}))
    for name, lost, longer in (
        ("equal", 0.0, 1.0),
        ("accuracy at its limit", margin, 1.0),
        ("length at its limit", 0.0, ratio),
        ("three times the margin lost", 3 * margin, 1.0),
        ("twice as long", 0.0, 2.0),
    ):
        pair = Simulated(prompts, samples, lost, longer)
        reports = [pair.judge(seed) for seed in range(pairs)]
        shares = {"whole": Counter[str](report.verdict for report in reports)}
        for check in ("accuracy", "thinking"):
            found = [report.find_check(check) for report in reports]
            shares[check] = Counter[str](each.verdict for each in found if each)
        print(json.dumps({"pairs": name, **shares}), flush=True)


if __name__ == "__main__":
    main()

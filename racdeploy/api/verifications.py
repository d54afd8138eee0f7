"""Verifications of bundles and comparisons of models, from records of options."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.api.options import AnswerOptions, CompareOptions, RecordOptions, VerifyOptions
from racdeploy.api.records import Verdict
from racdeploy.errors import UsageError
from racdeploy.files.caches import default_work_folder

if TYPE_CHECKING:
    from racdeploy.bundles.bundle import BundleToVerify
    from racdeploy.bundles.harness import HarnessRunner
    from racdeploy.bundles.verify import BundleVerification
    from racdeploy.engines.engine import Progress
    from racdeploy.recipe import Verification
    from racdeploy.runtime.deployed import DeployedModel
    from racdeploy.tasks import Problem
    from racdeploy.verification.compare import ModelComparison
    from racdeploy.verification.examiner import Examiner
    from racdeploy.verification.gate import Gate, Tier

_PROMPT_TOKENS = 1023  # room for a prompt, beside an answer
_VERDICTS = ("pass", "inconclusive", "fail")


def verify(options: VerifyOptions, progress: Progress | None = None) -> Verdict:
    """Verify a bundle."""
    verification, notes = open_verification(options, progress)
    report, records = verification.run()
    check_signature(options)  # the files that were verified are still those that were signed
    return Verdict.from_report(report, verification.gate, notes=notes, records=records)


def open_verification(
    options: VerifyOptions, progress: Progress | None = None
) -> tuple[BundleVerification, tuple[str, ...]]:
    """Return the verification of a bundle, and a note on its signature if there is one to check."""
    from racdeploy.bundles.bundle import BundleToVerify
    from racdeploy.bundles.verify import BundleVerification
    from racdeploy.verification.examiner import ServerOptions

    _check_owners(options)
    if options.server and options.harness:
        raise UsageError(
            "harness-with-server",
            "--harness asks the bundle's own models, which are served for it",
            remedy="leave out --server, or --harness",
        )

    server = ServerOptions(
        key_env=options.server_key_env,
        api=options.server_api,
        timeout_s=options.server_timeout,
        tokenizer=options.bundle / "tokenizer.json",
    )
    bundle = BundleToVerify(
        options.bundle,
        options.gate,
        options.tier,
        tasks=options.tasks,
        work=options.work or default_work_folder(),
        threads=options.threads,
        accel="off" if options.server else options.accel,
        progress=progress,
        server=server,
    )
    notes = check_signature(options)

    runner = _open_harness(options, bundle) if options.harness else None
    url = options.server
    if options.server_model:
        url = f"{url}#{options.server_model}"
    return BundleVerification(bundle, url, options.baseline, runner), notes


def _open_harness(options: VerifyOptions, bundle: BundleToVerify) -> HarnessRunner:
    from racdeploy.bundles.harness import HarnessRunner
    from racdeploy.harnesses import HarnessRequest, HarnessSettings

    include = options.harness_include
    settings = HarnessSettings(
        tasks=options.harness_tasks,
        limit=options.harness_limit,
        max_new_tokens=bundle.settings.max_new_tokens,
        context_tokens=bundle.settings.context_tokens,
        parallel=bundle.settings.parallel,
    )
    request = HarnessRequest(settings, include.resolve() if include else None)
    interpreter = options.harness_python or Path(sys.executable)
    return HarnessRunner(bundle, options.harness, request, interpreter.absolute())


def compare(options: CompareOptions, progress: Progress | None = None) -> tuple[Verdict, ...]:
    """Compare models with a reference; return the best first."""
    comparison = open_comparison(options, progress)
    verdicts = [
        Verdict.from_report(report, comparison.examiner.gate, records=records)
        for report, records in comparison.run()
    ]
    return tuple(sorted(verdicts, key=_rank))


def _rank(verdict: Verdict) -> tuple[int, float]:
    """Return what sorts verdicts: the verdict, then the seconds for each right answer."""
    arm = verdict.report.find_arm("pruned")
    seconds = arm.seconds_per_right if arm else None
    return _VERDICTS.index(verdict.verdict), seconds or math.inf


def open_comparison(options: CompareOptions, progress: Progress | None = None) -> ModelComparison:
    """Return the comparison of candidates with a reference model, or with a recorded one."""
    from racdeploy.verification.compare import (
        ModelComparison,
        check_named_once,
        name_distinctly,
    )
    from racdeploy.verification.gate import read_gate
    from racdeploy.verification.reference import (
        REFERENCE_NAME,
        Reference,
        check_same_questions,
        check_same_settings,
    )

    check_named_once(options.candidates)

    # Bonferroni's correction, before limits are widened for few prompts: a good file among many is
    # then not failed, or a bad one passed, more often than alone.
    gate = read_gate(options.gate)
    confidence = 1 - (1 - gate.confidence) / len(options.candidates)
    gate = gate.model_copy(update={"confidence": confidence})
    gate = gate.for_tier(options.tier, options.prompts or 0)
    folder = Path(options.against)

    if not (folder / REFERENCE_NAME).is_file():
        reference, *candidates = _find_models([options.against, *options.candidates])
        candidates = name_distinctly(candidates, options.candidates)
        settings = _choose_settings(options, [reference, *candidates])
        settings = _apply_tier(settings, options, gate)
        problems = _draw_problems(options.tasks, settings)
        examiner = _open_examiner(options, problems, settings, gate, progress=progress)
        return ModelComparison(reference, tuple(candidates), options.tasks, examiner)

    recorded = Reference.read(folder)
    check_same_questions(recorded, options.tasks)
    asked = vars(options) | (getattr(gate.tiers, options.tier).overrides if options.tier else {})
    check_same_settings(recorded, asked, folder)
    candidates = name_distinctly(_find_models(options.candidates), options.candidates)
    settings = _apply_tier(recorded.settings, options, gate)
    examiner = _open_examiner(options, recorded.problems, settings, gate, progress=progress)
    return ModelComparison(recorded, tuple(candidates), recorded.tasks, examiner)


def record(options: RecordOptions, progress: Progress | None = None) -> Path:
    """Record a model's answers as a reference, and return its folder."""
    examiner, model = open_recording(options, progress)
    examiner.check_lengths(model)
    with examiner.until_judged():
        examiner.record(model, options.tasks).write(options.out)
    return options.out


def open_recording(
    options: RecordOptions, progress: Progress | None = None
) -> tuple[Examiner, DeployedModel]:
    """Return what records a reference: the examiner and the model."""
    from racdeploy.verification.gate import read_gate

    (model,) = _find_models([str(options.model)])
    settings = _choose_settings(options, [model])
    problems = _draw_problems(options.tasks, settings)
    examiner = _open_examiner(options, problems, settings, read_gate(), progress=progress)
    return examiner, model


def _find_models(sources: Sequence[str]) -> list[DeployedModel]:
    """Open each model; the texts of a server are counted in the tokens of the first other one."""
    from racdeploy.runtime.deployed import find_model, find_served, is_url
    from racdeploy.runtime.loading import check_artifact_files

    local = {source: find_model(Path(source)) for source in sources if not is_url(source)}
    for source, model in local.items():
        if model.manifest:
            check_artifact_files(Path(source), model.manifest, model.entry)
    if not local:
        raise UsageError(
            "only-servers",
            "every model is behind a server, so no tokenizer counts their tokens",
            remedy="compare with the file that one of them serves",
        )
    counting = next(iter(local.values()))
    return [local.get(source) or find_served(source, counting) for source in sources]


def _choose_settings(options: AnswerOptions, models: Sequence[DeployedModel]) -> Verification:
    """Return the settings of the answers; what no option sets is the default or the models' own."""
    from racdeploy.files.toml import validate
    from racdeploy.recipe import Verification

    temperature = options.temperature
    if temperature is None and (options.samples or 1) > 1:
        temperature = models[0].settings.generation.temperature

    values = {
        "count": options.prompts or None,
        "samples": options.samples,
        "temperature": temperature,
        "max_new_tokens": options.max_new_tokens,
        "max_thinking_tokens": options.max_thinking_tokens,
        "context_tokens": options.context_tokens,
        "parallel": options.parallel,
        "seed": options.seed,
    }
    given = {name: value for name, value in values.items() if value is not None}
    settings = validate(Verification, given, "the options")
    positions = min(model.context_limit for model in models)
    return settings.with_limits(prompt_tokens=_PROMPT_TOKENS, positions=positions)


def _apply_tier(settings: Verification, options: CompareOptions, gate: Gate) -> Verification:
    """Return the settings with the number of prompts of the options or of their tier."""
    if options.prompts:
        settings = settings.model_copy(update={"count": options.prompts})
    if not options.tier:
        return settings
    tier: Tier = getattr(gate.tiers, options.tier)
    return tier.apply(settings, options.prompts or 0)


def _draw_problems(tasks: tuple[str, ...], settings: Verification) -> Sequence[Problem]:
    from racdeploy.tasks import TaskSet

    # Nothing calibrates here, so all questions of a file count.
    return TaskSet.load_evaluation(tasks).draw("evaluation", settings.seed, settings.count)


def _open_examiner(
    options: AnswerOptions,
    problems: Sequence[Problem],
    settings: Verification,
    gate: Gate,
    progress: Progress | None,
) -> Examiner:
    from racdeploy.engines.engine import EngineSettings
    from racdeploy.verification.answer_cache import AnswerCache
    from racdeploy.verification.examiner import Examiner, ServerOptions

    settings = settings.model_copy(update={"count": len(problems)})
    engine = EngineSettings(
        settings.context_tokens,
        settings.parallel,
        options.threads,
        cache_dtype=options.cache_type,
        flash_attention=options.flash_attention,
    )
    key_env = options.server_key_env if isinstance(options, CompareOptions) else ""
    return Examiner(
        problems,
        settings,
        gate,
        AnswerCache(options.work or default_work_folder(), repeats_finished=True, keeps=False),
        engine=engine,
        progress=progress,
        server=ServerOptions(key_env),
    )


def _check_owners(options: VerifyOptions) -> None:
    """Refuse options whose main option is missing."""
    belonging = {
        "server": (options.server_model, options.server_key_env),
        "harness": (
            options.harness_tasks,
            options.harness_limit,
            options.harness_include,
            options.harness_python,
        ),
    }
    for owner, values in belonging.items():
        if any(values) and not getattr(options, owner):
            raise UsageError(
                "missing-main-option",
                f"options that begin with --{owner}- belong to --{owner}",
                remedy=f"add --{owner}, see racdeploy verify --help",
            )


def check_signature(options: VerifyOptions) -> tuple[str, ...]:
    """Check the requested signature; return a note on it."""
    public_key, identity, issuer = options.public_key, options.identity, options.issuer
    if not (options.signature or public_key or identity or issuer):
        return ()

    if bool(public_key) == bool(identity) or bool(identity) != bool(issuer):
        raise UsageError(
            "key-or-identity",
            "a signature is compared with one key, or with one identity and its issuer",
            remedy="give --public-key FILE, or --identity WHO --issuer URL; see docs/publish.md",
        )

    from racdeploy.bundles import signature as signatures

    bundle = options.bundle
    signer = signatures.Signer(public_key, identity, issuer)
    file = options.signature or bundle / signatures.SIGNATURE_NAME
    signatures.check_signature(bundle, file, signer)
    return (f"every file of {bundle} matches the signature of {signer}",)

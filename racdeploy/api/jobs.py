"""Construction of a recipe, a build, a search or a verification from keyword options."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from racdeploy.errors import UsageError

if TYPE_CHECKING:
    from racdeploy.bundles.verify import BundleVerification
    from racdeploy.pipeline.build import Build
    from racdeploy.pipeline.job import Job
    from racdeploy.recipe import Recipe
    from racdeploy.runtime.deployed import DeployedModel
    from racdeploy.tasks import Problem
    from racdeploy.tuning.search import Search
    from racdeploy.verification.compare import ModelComparison
    from racdeploy.verification.examiner import Examiner
    from racdeploy.verification.gate import Gate

Options = Mapping[str, Any]
StrPath = str | os.PathLike[str]


class Saveable(Protocol):
    """A model or a tokenizer of transformers, in memory."""

    def save_pretrained(self, folder: Any, /) -> Any:
        """Write all files of the model or tokenizer into a folder."""


ModelSource = StrPath | Saveable
"""A folder, a Hub id, the embedded model's name, or a model in memory."""
OPTIONS: dict[str, dict[str, Any]] = tomllib.loads(
    (files("racdeploy.api") / "options.toml").read_text(encoding="utf-8")
)
"""What each option is, beside a keyword of a function; see the file."""
KEYS = {name: each["key"] for name, each in OPTIONS.items() if "key" in each}
"""Recipe keys that options set."""
TUNE_KEYS = KEYS | {name: each["tune_key"] for name, each in OPTIONS.items() if "tune_key" in each}
"""Recipe keys that the options of a search set; the search itself decides what is recovered."""
_SEVERAL = ("also", "task", "calibration_task", "vocabulary_text")
_SERVER = ("server", "server_model", "server_key_env", "server_api", "server_timeout")
_HARNESS = ("harness", "harness_tasks", "harness_limit", "harness_include", "harness_python")


def read_recipe(options: Options, keys: Mapping[str, str] = KEYS) -> Recipe:
    """Return the validated recipe of some options."""
    from racdeploy.recipe import Recipe

    values = _list_values(options, keys)
    recipe = Recipe.combine(as_path(options.get("recipe")), values)
    recipe.traces.check_key_destination(values.get("traces", {}), options.get("allow_key_to", ""))
    return recipe


def read_job(options: Options, keys: Mapping[str, str] = KEYS) -> Job:
    """Return the job of some options; their number of prompts overrides the tier's."""
    from racdeploy.pipeline.job import Job

    prompts = _list_values(options, keys).get("verify", {}).get("count", 0)
    return Job.at_tier(read_recipe(options, keys), options.get("tier", ""), prompts)


@contextmanager
def open_build(options: Options, *, is_checked: bool = True) -> Iterator[Build]:
    """Yield the build in the first process; other processes of the job do their share and exit.

    ``is_checked`` checks the model first; a whole build checks everything itself. A single stage
    leaves rounding to the later export, unless the recipe asks for chosen codes.
    """
    job = read_job(options)
    if is_checked and job.recipe.export.rounding is None:
        recipe = job.recipe.with_settings({"export": {"rounding": "nearest"}})
        job = replace(job, recipe=recipe)

    from racdeploy.pipeline.preflight import check_model, check_packages

    if not is_checked:
        check_packages(job)  # before modules that import some of them

    from racdeploy.pipeline.build import Build
    from racdeploy.pruning.process_group import join_process_group

    with join_process_group() as processes:
        progress = options.get("progress") if processes.is_first else None
        builder = Build(job, find_work(options), options["threads"], progress, processes)
        if not processes.is_first:
            builder.follow()
            raise SystemExit

        if is_checked:
            check_model(builder.job)
        yield builder


@contextmanager
def open_search(options: Options) -> Iterator[Search]:
    """Yield a search with its plan: all candidates and their predicted sizes."""
    from racdeploy.files.stages import scratch_folder
    from racdeploy.pipeline.job import fit_context
    from racdeploy.tuning.search import Search

    job = fit_context(read_job(options, TUNE_KEYS))
    work = find_work(options)
    with scratch_folder(work, 0) as scratch:
        search = Search(job, work, scratch, options["threads"], options.get("progress"))
        search.plan()
        yield search


def open_verification(options: Options) -> tuple[BundleVerification, tuple[str, ...]]:
    """Return the verification of a bundle, and a note on its signature if there is one to check."""
    from racdeploy.bundles.bundle import BundleToVerify
    from racdeploy.bundles.harness import HarnessRunner
    from racdeploy.bundles.verify import BundleVerification
    from racdeploy.harnesses import HarnessRequest
    from racdeploy.verification.examiner import ServerOptions

    server, model, key_env, api, timeout_s = map(options.__getitem__, _SERVER)
    harness, tasks, limit, include, python = map(options.__getitem__, _HARNESS)
    _check_owner("server", server, model, key_env)
    _check_owner("harness", harness, tasks, limit, include, python)
    if server and harness:
        raise UsageError(
            "harness-with-server",
            "--harness asks the bundle's own models, which are served for it",
            remedy="leave out --server, or --harness",
        )

    folder, baseline = Path(options["bundle"]), as_path(options["baseline"])
    named, work, progress = options["task"], find_work(options), options.get("progress")
    bundle = BundleToVerify(
        folder,
        as_path(options["gate"]),
        options["tier"],
        [named] if isinstance(named, str) else named,
        work,
        options["threads"],
        "off" if server else options["accel"],
        progress,
        ServerOptions(key_env, api, timeout_s, folder / "tokenizer.json"),
    )
    notes = check_signature(options)

    runner = None
    if harness:
        asked = bundle.settings
        request = HarnessRequest(
            tuple(tasks),
            limit,
            include and Path(include).resolve(),
            asked.max_new_tokens,
            asked.context_tokens,
            asked.parallel,
        )
        interpreter = Path(python or sys.executable).absolute()
        runner = HarnessRunner(bundle, harness, request, interpreter)
    served = f"{server}#{model}" if model else server
    return BundleVerification(bundle, served, baseline, runner), notes


def open_comparison(options: Options) -> ModelComparison:
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

    tasks = tuple(options["task"])
    sources = [str(source) for source in options["candidates"]]
    check_named_once(sources)
    # Bonferroni's correction, before limits are widened for few prompts: a good file among many is
    # then not failed, or a bad one passed, more often than alone.
    gate = read_gate(as_path(options["gate"]))
    confidence = 1 - (1 - gate.confidence) / len(sources)
    gate = gate.model_copy(update={"confidence": confidence})
    gate = gate.for_tier(options["tier"], options["prompts"] or 0)
    folder = Path(options["against"])
    if not (folder / REFERENCE_NAME).is_file():
        reference, *candidates = _find_models([str(options["against"]), *sources])
        candidates = name_distinctly(candidates, sources)
        examiner = _open_examiner(options, tasks, (reference, *candidates), gate)
        return ModelComparison(reference, tuple(candidates), tasks, examiner)

    recorded = Reference.read(folder)
    check_same_questions(recorded, tasks)
    tier = options["tier"]
    overrides = getattr(gate.tiers, tier).overrides if tier else {}
    check_same_settings(recorded, {**options, **overrides}, folder)
    candidates = name_distinctly(_find_models(sources), sources)
    chosen = {**options, **dict(recorded.settings)}
    examiner = _open_examiner(chosen, recorded.tasks, candidates, gate, recorded.problems)
    return ModelComparison(recorded, tuple(candidates), recorded.tasks, examiner)


def open_recording(options: Options) -> tuple[Examiner, DeployedModel, tuple[str, ...]]:
    """Return what records a reference: the examiner, the model and its tasks."""
    from racdeploy.verification.gate import read_gate

    tasks = tuple(options["task"])
    (model,) = _find_models([str(options["model"])])
    return _open_examiner({**options, "tier": ""}, tasks, (model,), read_gate()), model, tasks


def _find_models(sources: Sequence[str]) -> list[DeployedModel]:
    """Open each model; the texts of a server are counted in the tokens of the first other one."""
    from racdeploy.runtime.deployed import find_model, find_served, is_url
    from racdeploy.runtime.loading import check_artifact_files

    found = {source: find_model(Path(source)) for source in sources if not is_url(source)}
    for source, model in found.items():
        if model.manifest:
            check_artifact_files(Path(source), model.manifest, model.entry)
    if not found:
        raise UsageError(
            "only-servers",
            "every model is behind a server, so no tokenizer counts their tokens",
            remedy="compare with the file that one of them serves",
        )
    counting = next(iter(found.values()))
    return [found.get(source) or find_served(source, counting) for source in sources]


def _open_examiner(
    options: Options,
    tasks: tuple[str, ...],
    models: Sequence[DeployedModel],
    gate: Gate,
    problems: Sequence[Problem] = (),
) -> Examiner:
    from racdeploy.engines.engine import EngineSettings
    from racdeploy.files.toml import validate
    from racdeploy.recipe import Verification
    from racdeploy.tasks import TaskSet
    from racdeploy.verification.answer_cache import AnswerCache
    from racdeploy.verification.examiner import Examiner, ServerOptions

    names = Verification.model_fields.keys() & options.keys()
    chosen = {name: options[name] for name in names if options[name] is not None}
    if options.get("prompts"):
        chosen["count"] = options["prompts"]
    if chosen.get("samples", 1) > 1:
        chosen.setdefault("temperature", models[0].settings.generation.temperature)
    default = Verification.model_fields["context_tokens"].default
    chosen.setdefault("context_tokens", min(default, *(model.context_limit for model in models)))
    settings = validate(Verification, chosen, "the options")
    if tier := options["tier"]:
        settings = getattr(gate.tiers, tier).apply(settings, options["prompts"] or 0)

    engine = EngineSettings(
        settings.context_tokens,
        settings.parallel,
        options["threads"],
        options["cache_type"],
        options["flash_attention"],
    )
    if not problems:
        # Nothing calibrates here, so all questions of a file count.
        asked = TaskSet.load_evaluation(tasks)
        problems = asked.draw("evaluation", settings.seed, settings.count)
    settings = settings.model_copy(update={"count": len(problems)})
    cache = AnswerCache(find_work(options), repeats_finished=True, keeps=False)
    return Examiner(
        problems,
        settings,
        gate,
        cache,
        engine=engine,
        progress=options.get("progress"),
        server=ServerOptions(options.get("server_key_env", "")),
    )


def find_work(options: Options) -> Path:
    """Return the folder of stage results."""
    from racdeploy.files.caches import default_work_folder

    return as_path(options.get("work")) or default_work_folder()


def as_path(path: StrPath | None) -> Path | None:
    """Return the path of a string or path; None if it is empty."""
    return Path(path) if path else None


def note_replaced(file: Path | None) -> list[str]:
    """Return a note where a file will be overwritten."""
    return [f"{file} existed and was replaced"] if file and file.exists() else []


def save_model(model: ModelSource, options: Options) -> str:
    """Return the name or folder of a model; one in memory is saved into the work folder first.

    Raises:
        UsageError: a model in memory comes without its tokenizer.
    """
    if isinstance(model, str | os.PathLike):
        return str(model)

    tokenizer = options.get("tokenizer")
    if tokenizer is None:
        raise UsageError(
            "no-tokenizer-given",
            f"a {type(model).__name__} in memory comes without its tokenizer",
            remedy="tokenizer=AutoTokenizer.from_pretrained(NAME)",
        )

    from racdeploy.files.stages import Stage, scratch_folder
    from racdeploy.files.writing import file_sha256

    work = find_work(options)
    # Artifacts are named after the folder.
    name = Path(getattr(model, "name_or_path", "")).name or "model"
    with scratch_folder(work, 0) as scratch:
        saved = scratch / name
        for each in (model, tokenizer):
            each.save_pretrained(saved)

        stage = Stage.locate(
            work, "model", {file.name: file_sha256(file) for file in saved.glob("*.*")}
        )
        folder = stage.folder / name
        stage.make_folder()
        if not folder.exists():
            saved.rename(folder)
            stage.finish({})
    return str(folder)


def _list_values(options: Options, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return the nested recipe values of options; the option ``settings`` overrides the others."""
    from racdeploy.files.toml import merge, read_toml
    from racdeploy.verification.gate import read_gate
    from racdeploy.verification.rivals import SAME_SIZE

    value_by_key: dict[str, Any] = {}
    for name, key in keys.items():
        value = options.get(name)
        if isinstance(value, str) and name in _SEVERAL:
            value = [value]
        if value or type(value) in (int, float):  # 0 is a value, False means not given
            value_by_key[key] = value

    if model := options.get("model"):
        value_by_key["model"] = save_model(model, options)
    if options.get("controls"):
        value_by_key["verify.controls"] = [SAME_SIZE]
    if gate := as_path(options.get("gate")):
        read_gate(gate)
        value_by_key["gate"] = read_toml(gate)

    values: dict[str, Any] = {}
    for key, value in (*value_by_key.items(), *(options.get("settings") or {}).items()):
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def _check_owner(option: str, value: str, *settings: object) -> None:
    """Refuse options whose main option is missing."""
    if not value and any(settings):
        raise UsageError(
            "missing-main-option",
            f"options that begin with --{option}- belong to --{option}",
            remedy=f"add --{option}, see racdeploy verify --help",
        )


def check_signature(options: Options) -> tuple[str, ...]:
    """Check the requested signature; return a note on it."""
    bundle = Path(options["bundle"])
    names = ("signature", "public_key", "identity", "issuer")
    signature, public_key, identity, issuer = map(options.__getitem__, names)
    if not (signature or public_key or identity or issuer):
        return ()

    if bool(public_key) == bool(identity) or bool(identity) != bool(issuer):
        raise UsageError(
            "key-or-identity",
            "a signature is compared with one key, or with one identity and its issuer",
            remedy="give --public-key FILE, or --identity WHO --issuer URL; see docs/publish.md",
        )

    from racdeploy.bundles import signature as signatures

    signer = signatures.Signer(as_path(public_key), identity, issuer)
    file = as_path(signature) or bundle / signatures.SIGNATURE_NAME
    signatures.check_signature(bundle, file, signer)
    return (f"every file of {bundle} matches the signature of {signer}",)

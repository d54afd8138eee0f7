"""Functions of the library: ``build`` and its steps, ``tune``, ``verify``, ``compare`` and others.

The functions print nothing. They import torch only when they need it. What a keyword and an option
of the command line share is explained here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from racdeploy.api import builds, verifications
from racdeploy.api.builds import ModelSource, OnEvent, Saveable, StrPath, save_model
from racdeploy.api.options import (
    BuildOptions,
    CompareOptions,
    ExportOptions,
    PruneOptions,
    RecordOptions,
    RecoverOptions,
    TuneOptions,
    VerifyOptions,
)
from racdeploy.api.records import Bundle, ExportedFile, PrunedFolder, TunedBundle, Verdict

if TYPE_CHECKING:
    from racdeploy.bundles.bench import BenchResult
    from racdeploy.bundles.inspect import Inspection
    from racdeploy.engines.engine import Progress
    from racdeploy.recipe import Recipe
    from racdeploy.sparse_kernels import AccelMode
    from racdeploy.verification.gate import Gate

S = TypeVar("S", "Recipe", "Gate")


def build(
    model: ModelSource,
    *,
    recipe: Recipe | StrPath | None = None,
    target: str | None = None,
    more_targets: Sequence[str] = (),
    tasks: Sequence[str] = (),
    gate: Gate | StrPath | None = None,
    tier: str = "",
    tokenizer: Saveable | None = None,
    key_host: str = "",
    out: StrPath | None = None,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Bundle:
    """Prune, export, verify and bundle a model: the main job.

    Args:
        model: Local folder, Hub id, or tiny-reasoner, the embedded model; or a transformers model
            in memory, which is saved into the work folder.
        recipe: All other settings: a recipe, or its TOML file. The keywords override it.
        target: Where it will run; default: gguf. List: racdeploy targets.
        more_targets: More targets, for other engines.
        tasks: Tasks to verify on: a name, gym:NAME, jsonl:FILE, gsm8k:FILE or hub:gsm8k.
        gate: TOML file with limits; see docs/ci.md.
        tier: Extent of the verification: smoke, standard or release.
        tokenizer: Tokenizer of a model in memory.
        key_host: Host that may receive the API key named by a recipe file; see docs/tasks.md.
        out: Folder to write; default: the artifact's name.
        work: Folder of stage results; default: user cache.
        threads: CPU threads; 0 uses every core.
        progress: Called with a stage's name, finished units, all units, and tokens.

    Raises:
        UsageError: options, recipe or model cannot be used.
        GateError: an exported file computes something different from its model.
        EnvironmentFailure: an extra, disk space, memory or a device is missing.
    """
    options = BuildOptions(
        model=save_model(model, tokenizer, _as_path(work)),
        recipe=_as_file(recipe),
        target=target,
        more_targets=_as_names(more_targets),
        tasks=_as_names(tasks),
        gate=_as_file(gate),
        tier=tier,
        key_host=key_host,
        out=_as_path(out),
        work=_as_path(work),
        threads=threads,
    )
    return builds.build(options, progress)


def prune(
    model: ModelSource,
    *,
    recipe: Recipe | StrPath | None = None,
    target: str | None = None,
    tasks: Sequence[str] = (),
    tokenizer: Saveable | None = None,
    key_host: str = "",
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> PrunedFolder:
    """Prune a model on its own traces; the result is a folder in safetensors.

    Options and errors are those of :func:`build`.
    """
    options = PruneOptions(
        model=save_model(model, tokenizer, _as_path(work)),
        recipe=_as_file(recipe),
        target=target,
        tasks=_as_names(tasks),
        key_host=key_host,
        work=_as_path(work),
        threads=threads,
    )
    return builds.prune(options, progress)


def recover(
    model: ModelSource,
    pruned: StrPath,
    *,
    recipe: Recipe | StrPath | None = None,
    target: str | None = None,
    tasks: Sequence[str] = (),
    tokenizer: Saveable | None = None,
    key_host: str = "",
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> PrunedFolder:
    """Train a pruned model to match the dense one; the result is a new folder.

    Options and errors are those of :func:`build`; ``recover.tokens`` of the recipe says how long it
    is trained.

    Args:
        pruned: Folder of the pruned model.
    """
    options = RecoverOptions(
        model=save_model(model, tokenizer, _as_path(work)),
        pruned=Path(pruned),
        recipe=_as_file(recipe),
        target=target,
        tasks=_as_names(tasks),
        key_host=key_host,
        work=_as_path(work),
        threads=threads,
    )
    return builds.recover(options, progress)


def export(
    model: ModelSource,
    *,
    target: str | None = None,
    quant: str | None = None,
    packing: str | None = None,
    allow_losing_zeros: bool = False,
    accept_token_differences: float | None = None,
    tokenizer: Saveable | None = None,
    out: StrPath | None = None,
    work: StrPath | None = None,
) -> ExportedFile:
    """Export a model as it is, dense or pruned.

    Options and errors are those of :func:`build`.

    Args:
        quant: Number format of the linears; default: q8_0, or the target's.
        packing: Storage of the zeros; default: plain, stored like other weights.
        allow_losing_zeros: Continue even if the number format does not preserve the zeros.
        accept_token_differences: Share of hard strings that llama.cpp may tokenize differently;
            default: 0.
        out: File to write; default: MODEL-QUANT here.
        work: Folder that a model in memory is saved into; default: user cache.
    """
    options = ExportOptions(
        model=save_model(model, tokenizer, _as_path(work)),
        target=target,
        quant=quant,
        packing=packing,
        allow_losing_zeros=allow_losing_zeros,
        accept_token_differences=accept_token_differences,
        out=_as_path(out),
        work=_as_path(work),
    )
    return builds.export(options)


def tune(
    model: ModelSource,
    *,
    recipe: Recipe | StrPath | None = None,
    target: str | None = None,
    tasks: Sequence[str] = (),
    tier: str = "",
    tokenizer: Saveable | None = None,
    key_host: str = "",
    out: StrPath | None = None,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    on_event: OnEvent | None = None,
) -> TunedBundle:
    """Search for the best dense or pruned model for a device, build it and verify it.

    Options and errors are those of :func:`build`; what is best, the limits and the time are in the
    recipe's ``tune``.

    Args:
        on_event: Called with the plan's sentences, then with each candidate that finishes a step.
    """
    options = TuneOptions(
        model=save_model(model, tokenizer, _as_path(work)),
        recipe=_as_file(recipe),
        target=target,
        tasks=_as_names(tasks),
        tier=tier,
        key_host=key_host,
        out=_as_path(out),
        work=_as_path(work),
        threads=threads,
    )
    return builds.tune(options, progress, on_event)


def verify(
    bundle: StrPath,
    *,
    tier: str = "",
    tasks: Sequence[str] = (),
    gate: Gate | StrPath | None = None,
    baseline: StrPath | None = None,
    server: str = "",
    server_model: str = "",
    server_key_env: str = "",
    server_api: Literal["chat", "completions"] = "chat",
    server_timeout: float = 1800.0,
    harness: str = "",
    harness_tasks: Sequence[str] = (),
    harness_limit: int = 0,
    harness_include: StrPath | None = None,
    harness_python: StrPath | None = None,
    signature: StrPath | None = None,
    public_key: StrPath | None = None,
    identity: str = "",
    issuer: str = "",
    work: StrPath | None = None,
    accel: AccelMode = "auto",
    threads: int = 0,
    progress: Progress | None = None,
) -> Verdict:
    """Rerun the bundle's prompts on its artifact and compare with the dense records in it.

    Args:
        bundle: Bundle folder.
        tier: Extent of the verification: smoke, standard or release.
        tasks: Tasks of the bundle's recipe that may read files or the Hub, for more prompts.
        gate: TOML file with limits; see docs/ci.md.
        baseline: Dense artifact to rerun, or another bundle of the same dense model.
        server: OpenAI-compatible API to verify instead of the artifact, http://HOST:PORT/v1.
        server_model: Name of the model on the server.
        server_key_env: Environment variable that holds the server's key.
        server_api: API that is called: chat, with messages; or completions, with token ids.
        server_timeout: Maximum seconds for one of its answers.
        harness: Harness that also evaluates both models: lm-eval or lighteval.
        harness_tasks: Names of the harness's tasks.
        harness_limit: Maximum documents per task; 0 for all.
        harness_include: Folder (lm-eval) or Python file (lighteval) that defines more tasks.
        harness_python: Python with the harness installed; default: racdeploy's.
        signature: File with the bundle's signature; default: model.sig in the bundle.
        public_key: PEM file of the signer's public key.
        identity: Signer at sigstore, in place of a key: a workflow or an email address.
        issuer: OpenID provider of that identity.
        work: Folder of stage results; default: user cache.
        accel: Kernels for sparse weights; see kernels/README.md.
        threads: CPU threads; 0 uses every core.
        progress: Called with a stage's name, finished units, all units, and tokens.

    Raises:
        UsageError: options exclude each other, or the bundle cannot be used.
        ArtifactError: the bundle is damaged, or its signature does not match.
        EngineError: the engine cannot run the artifact.
    """
    options = VerifyOptions(
        bundle=Path(bundle),
        tier=tier,
        tasks=_as_names(tasks),
        gate=_as_file(gate),
        baseline=_as_path(baseline),
        server=server,
        server_model=server_model,
        server_key_env=server_key_env,
        server_api=server_api,
        server_timeout=server_timeout,
        harness=harness,
        harness_tasks=_as_names(harness_tasks),
        harness_limit=harness_limit,
        harness_include=_as_path(harness_include),
        harness_python=_as_path(harness_python),
        signature=_as_path(signature),
        public_key=_as_path(public_key),
        identity=identity,
        issuer=issuer,
        work=_as_path(work),
        accel=accel,
        threads=threads,
    )
    return verifications.verify(options, progress)


def compare(
    candidates: Sequence[StrPath],
    *,
    against: StrPath,
    tasks: Sequence[str] = (),
    prompts: int | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    max_thinking_tokens: int | None = None,
    context_tokens: int | None = None,
    parallel: int | None = None,
    seed: int | None = None,
    cache_type: Literal["f16", "f32", "q8_0"] = "f16",
    flash_attention: bool = False,
    server_key_env: str = "",
    tier: str = "",
    gate: Gate | StrPath | None = None,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Verdict, ...]:
    """Ask any models the same questions and compare each with a reference, best first.

    Each verdict has the name of its candidate; what its record calls dense is the reference.

    Args:
        candidates: GGUF files, ONNX files or folders, bundles, model folders of transformers, or
            servers as http://HOST:PORT/v1#MODEL.
        against: Model to compare with, or the folder of a recorded one.
        tasks: Tasks to ask: a name, gym:NAME, jsonl:FILE, gsm8k:FILE or hub:gsm8k.
        prompts: Number of questions; default: 200, or the tier's.
        samples: Answers to each question; more than one needs a temperature.
        temperature: 0 is greedy, the default; for several samples the reference's own.
        max_new_tokens: Maximum tokens of an answer, with its thinking; default: 1024.
        max_thinking_tokens: Maximum thinking tokens; then the thinking is closed.
        context_tokens: Context of each engine; default: 2048.
        parallel: Sequences decoded together.
        seed: Choice of the questions, and of the samples.
        cache_type: Number format of llama.cpp's key-value cache.
        flash_attention: Use llama.cpp's flash attention.
        server_key_env: Environment variable that holds the servers' key.

    Raises:
        UsageError: a task has no questions, or they do not fit a context.
        ArtifactError: a file is no model, or lacks tokenizer or template.
        EngineError: an engine cannot run one.
    """
    options = CompareOptions(
        candidates=tuple(str(candidate) for candidate in candidates),
        against=str(against),
        tasks=_as_names(tasks),
        prompts=prompts,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        max_thinking_tokens=max_thinking_tokens,
        context_tokens=context_tokens,
        parallel=parallel,
        seed=seed,
        cache_type=cache_type,
        flash_attention=flash_attention,
        server_key_env=server_key_env,
        tier=tier,
        gate=_as_file(gate),
        work=_as_path(work),
        threads=threads,
    )
    return verifications.compare(options, progress)


def record(
    model: StrPath,
    *,
    out: StrPath,
    tasks: Sequence[str] = (),
    prompts: int | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    max_thinking_tokens: int | None = None,
    context_tokens: int | None = None,
    parallel: int | None = None,
    seed: int | None = None,
    cache_type: Literal["f16", "f32", "q8_0"] = "f16",
    flash_attention: bool = False,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Record a model's answers as a reference, and return its folder.

    :func:`compare` then needs neither this model nor the task's file. Options and errors are those
    of :func:`compare`.

    Args:
        model: GGUF file, ONNX file or folder, bundle, or model folder of transformers.
        out: Folder to write.
    """
    options = RecordOptions(
        model=Path(model),
        out=Path(out),
        tasks=_as_names(tasks),
        prompts=prompts,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        max_thinking_tokens=max_thinking_tokens,
        context_tokens=context_tokens,
        parallel=parallel,
        seed=seed,
        cache_type=cache_type,
        flash_attention=flash_attention,
        work=_as_path(work),
        threads=threads,
    )
    return verifications.record(options, progress)


def inspect(path: StrPath) -> Inspection:
    """Return types, sizes, zeros and hashes of a file, model folder or bundle, and its tensors.

    Raises:
        ArtifactError: the path does not exist, or its kind is unknown.
    """
    from racdeploy.bundles.inspect import inspect_path

    return inspect_path(Path(path))


def bench(
    bundle: StrPath,
    *,
    dense: StrPath | None = None,
    rounds: int = 5,
    prompt_tokens: int = 256,
    new_tokens: int = 128,
    parallel: int = 1,
    accel: AccelMode = "auto",
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> BenchResult:
    """Compare speed and memory of an artifact with the dense one, in alternating runs.

    Args:
        bundle: Bundle folder, or a model file.
        dense: Dense artifact; default: the build's, in the work folder.
        rounds: Runs of each artifact, alternating.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens to decode.
        parallel: Sequences decoded together.

    Raises:
        ArtifactError: the dense file is missing, or the bundle is damaged.
        UsageError: the tokens exceed the context.
    """
    from racdeploy.bundles import bench as benchmark
    from racdeploy.files.caches import default_work_folder

    artifact = _as_path(dense) or benchmark.find_dense_artifact(
        Path(bundle), _as_path(work) or default_work_folder()
    )
    settings = benchmark.BenchSettings(
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        parallel=parallel,
        threads=threads,
        accel=accel,
    )
    return benchmark.bench(Path(bundle), artifact, settings, progress)


def _as_path(path: StrPath | None) -> Path | None:
    """Return the path of a string or path; None if it is empty."""
    return Path(path) if path else None


def _as_file(source: S | StrPath | None) -> S | Path | None:
    """Return the path of a file that is named; a record is returned as it is."""
    if isinstance(source, str | os.PathLike):
        return _as_path(source)
    return source


def _as_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple; a single text is one name."""
    return (names,) if isinstance(names, str) else tuple(names)

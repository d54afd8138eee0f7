"""Functions of the library: ``build`` and its steps, ``tune``, ``verify`` and ``compare``.

Keywords have the names of the command line's options, and the docstrings here are their help.
The functions print nothing. They import torch only when they need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from racdeploy.api import jobs
from racdeploy.api.jobs import ModelSource, Saveable, StrPath
from racdeploy.api.records import Bundle, ExportedFile, PrunedFolder, TunedBundle, Verdict
from racdeploy.errors import UsageError

if TYPE_CHECKING:
    from racdeploy.engines.engine import Progress
    from racdeploy.results.report import Report
    from racdeploy.results.tuning import Candidate
    from racdeploy.sparse_kernels import AccelMode


def build(
    model: ModelSource | None = None,
    *,
    tokenizer: Saveable | None = None,
    target: str | None = None,
    also: Sequence[str] = (),
    recipe: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    task: Sequence[str] = (),
    calibration_task: Sequence[str] = (),
    calibration: str | None = None,
    trace_prompts: int | None = None,
    trace_server: str | None = None,
    allow_key_to: str = "",
    keep: Mapping[str, float] | None = None,
    vocabulary_text: Sequence[str] = (),
    sparsity: float | None = None,
    pattern: str | None = None,
    method: str | None = None,
    quant: str | None = None,
    packing: str | None = None,
    allow_losing_zeros: bool = False,
    accept_token_differences: float | None = None,
    recover_tokens: int | None = None,
    shorten: bool = False,
    tier: str = "",
    prompts: int | None = None,
    gate: StrPath | None = None,
    controls: bool = False,
    out: StrPath | None = None,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Bundle:
    """Prune, export, verify and bundle a model: the main job.

    Args:
        model: Local folder, Hub id, or tiny-reasoner, the default; or a transformers model in
            memory, which is saved into the work folder.
        tokenizer: Tokenizer of a model in memory.
        target: Where it will run; default: gguf. List: racdeploy targets.
        also: More targets, for other engines.
        recipe: TOML recipe; racdeploy init writes one.
        settings: Values of the recipe by key, as ``{"prune.refit_steps": 40}``; they override the
            other options.
        task: Tasks to verify on: a name, jsonl:FILE, gsm8k:FILE or hub:gsm8k.
        calibration_task: Tasks for the traces; default: the tasks to verify on.
        calibration: Part of the traces to prune on: rac (prompt and thinking; default) or prompt.
        trace_prompts: Number of calibration prompts; default: 256.
        trace_server: OpenAI-compatible API that generates the traces, http://HOST:PORT/v1.
        allow_key_to: Host that may receive the API key named by a recipe file; see docs/tasks.md.
        keep: Share of each part that is kept, as ``{"ffn": 0.75}``; default: the target's.
        vocabulary_text: Texts whose tokens a cut vocabulary keeps.
        sparsity: Fraction of zeros, 0 to 1; default: 0, or 0.5 if other options need zeros.
        pattern: N:M, with N weights kept of M; or unstructured, the default.
        method: Pruning method; default: sparsegpt.
        quant: Number format of the linears; default: q8_0, or the target's.
        packing: Storage of the zeros; default: plain, stored like other weights.
        allow_losing_zeros: Continue even if the number format does not preserve the zeros.
        accept_token_differences: Share of hard strings that llama.cpp may tokenize differently;
            default: 0.
        recover_tokens: Tokens of the training that recovers accuracy; 0 is off.
        shorten: First let the model learn to think less; see docs/thinking.md.
        tier: Extent of the verification: smoke, standard or release.
        prompts: Number of evaluation prompts, in place of the tier's; default: 200.
        gate: TOML file with limits; see docs/ci.md.
        controls: Evaluate dense models of about the artifact's size too.
        out: Folder to write; default: the artifact's name.
        work: Folder of stage results; default: user cache.
        threads: CPU threads; 0 uses every core.
        progress: Called with a stage's name, finished units, all units, and tokens.

    Raises:
        UsageError: options, recipe or model cannot be used.
        GateError: an exported file computes something different from its model.
        EnvironmentFailure: an extra, disk space, memory or a device is missing.
    """
    with jobs.open_build(locals(), is_checked=False) as builder:
        from racdeploy.pipeline.strategy import choose_strategy

        folder, report = choose_strategy(builder).run(jobs.as_path(out))
        return Bundle.from_report(report, builder.job.gate, folder=folder)


def prune(
    model: ModelSource | None = None,
    *,
    tokenizer: Saveable | None = None,
    target: str | None = None,
    recipe: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    task: Sequence[str] = (),
    calibration_task: Sequence[str] = (),
    calibration: str | None = None,
    trace_prompts: int | None = None,
    trace_server: str | None = None,
    allow_key_to: str = "",
    keep: Mapping[str, float] | None = None,
    vocabulary_text: Sequence[str] = (),
    sparsity: float | None = None,
    pattern: str | None = None,
    method: str | None = None,
    recover_tokens: int | None = None,
    shorten: bool = False,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> PrunedFolder:
    """Prune a model on its own traces; the result is a folder in safetensors.

    Options and errors are those of :func:`build`.
    """
    from racdeploy.pipeline.structure import measure_kept
    from racdeploy.report.structure import describe_remaining

    with jobs.open_build(locals()) as builder:
        pruned = builder.prune()
        kept = measure_kept(builder.job.checkpoint, pruned.checkpoint)

    remaining = describe_remaining(kept, pruned.structure)
    notes = (*([f"kept: {remaining}"] if remaining else []), *pruned.notes)
    return PrunedFolder(pruned.folder, pruned.sparsity, notes, pruned.recovery)


def recover(
    model: ModelSource | None = None,
    pruned: StrPath | None = None,
    *,
    tokenizer: Saveable | None = None,
    target: str | None = None,
    recipe: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    task: Sequence[str] = (),
    calibration_task: Sequence[str] = (),
    trace_prompts: int | None = None,
    trace_server: str | None = None,
    allow_key_to: str = "",
    recover_tokens: int | None = None,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> PrunedFolder:
    """Train a pruned model to match the dense one; the result is a new folder.

    Options and errors are those of :func:`build`.

    Args:
        pruned: Folder of the pruned model.
    """
    if pruned is None:
        raise UsageError(
            "no-pruned-model",
            "the folder of the pruned model is missing; the dense model comes first",
            remedy="racdeploy recover MODEL PRUNED --recover-tokens 1000000",
        )

    with jobs.open_build(locals()) as builder:
        recovered = builder.recover(Path(pruned))
    return PrunedFolder(recovered.folder, recovered.sparsity, recovered.notes, recovered.recovery)


def export(
    model: ModelSource,
    *,
    tokenizer: Saveable | None = None,
    target: str | None = None,
    quant: str | None = None,
    packing: str | None = None,
    allow_losing_zeros: bool = False,
    accept_token_differences: float | None = None,
    out: StrPath | None = None,
    work: StrPath | None = None,
) -> ExportedFile:
    """Export a model as it is, dense or pruned.

    Options and errors are those of :func:`build`.

    Args:
        out: File to write; default: MODEL-QUANT here.
    """
    from racdeploy import exporting
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.models.sources import resolve_model
    from racdeploy.pipeline.lost_zeros import check_folder_zeros
    from racdeploy.pipeline.naming import default_export_path
    from racdeploy.pipeline.token_differences import check_tokens

    recipe = jobs.read_recipe(locals())
    resolved, chosen = resolve_model(recipe.model), recipe.export
    checkpoint = Checkpoint(resolved.folder)
    check_folder_zeros(checkpoint, chosen)
    tokens = check_tokens(checkpoint, chosen)

    file = jobs.as_path(out) or default_export_path(resolved.name, chosen)
    replaced = jobs.note_replaced(file)
    result = exporting.write(checkpoint, file, chosen)

    notes = [*replaced, *checkpoint.notes, tokens, *result.notes]
    kept = tuple(note for note in notes if note)
    return ExportedFile(result.path, result.size_bytes, dict(result.files), kept)


def tune(
    model: ModelSource | None = None,
    *,
    tokenizer: Saveable | None = None,
    target: str | None = None,
    recipe: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    task: Sequence[str] = (),
    calibration_task: Sequence[str] = (),
    trace_prompts: int | None = None,
    trace_server: str | None = None,
    allow_key_to: str = "",
    objective: str | None = None,
    max_bytes: int | None = None,
    max_memory: int | None = None,
    min_tokens_per_s: float | None = None,
    min_accuracy_ratio: float | None = None,
    budget: float | None = None,
    recover_tokens: int | None = None,
    tier: str = "",
    prompts: int | None = None,
    out: StrPath | None = None,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    on_event: Callable[[list[str] | Candidate], None] | None = None,
) -> TunedBundle:
    """Search for the best dense or pruned model for a device, build it and verify it.

    Options and errors are those of :func:`build`, except:

    Args:
        objective: accuracy, the default, size, speed or seconds-per-correct-answer.
        max_bytes: Maximum file size, in bytes.
        max_memory: Maximum memory, in bytes; default: the target's.
        min_tokens_per_s: Minimum speed on the target.
        min_accuracy_ratio: Minimum share of the dense model's accuracy.
        budget: Maximum time of the search, in seconds.
        recover_tokens: Tokens of the training of pruned candidates; 0 is off.
        on_event: Called with the plan's sentences, then with each candidate that finishes a step.
    """
    from racdeploy.tuning.plan import describe_plan
    from racdeploy.tuning.winner import tune as search_and_build

    with jobs.open_search(locals()) as search:
        if on_event:
            on_event(describe_plan(search))
            search.on_candidate = on_event
        folder, report, tuning = search_and_build(search, jobs.as_path(out))
        return TunedBundle.from_report(report, search.job.gate, folder=folder, tuning=tuning)


def verify(
    bundle: StrPath,
    *,
    tier: str = "",
    task: Sequence[str] = (),
    gate: StrPath | None = None,
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
        task: Tasks of the bundle's recipe that may read files or the Hub, for more prompts.
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
    options = locals()
    verification, notes = jobs.open_verification(options)
    report, records = verification.run()
    jobs.check_signature(options)  # the files that were verified are still those that were signed
    return Verdict.from_report(report, verification.gate, notes=notes, records=records)


def compare(
    candidates: Sequence[StrPath],
    *,
    against: StrPath,
    task: Sequence[str] = (),
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
    gate: StrPath | None = None,
    work: StrPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Verdict, ...]:
    """Ask any models the same questions and compare each with a reference, best first.

    ``report.model`` names each; what its record calls dense is the reference.

    Args:
        candidates: GGUF files, ONNX files or folders, bundles, model folders of transformers, or
            servers as http://HOST:PORT/v1#MODEL.
        against: Model to compare with, or the folder of a recorded one.
        task: Tasks to ask: a name, jsonl:FILE, gsm8k:FILE or hub:gsm8k.
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
    comparison = jobs.open_comparison(locals())
    verdicts = [
        Verdict.from_report(report, comparison.examiner.gate, records=records)
        for report, records in comparison.run()
    ]
    order = ("pass", "inconclusive", "fail")
    return tuple(sorted(verdicts, key=lambda each: (order.index(each.verdict), _rank(each.report))))


def _rank(report: Report) -> float:
    """Return the candidate's seconds for each right answer; infinity if they are unknown."""
    arm = report.find_arm("pruned")
    return arm.seconds_per_right or math.inf if arm else math.inf


def record(
    model: StrPath,
    *,
    out: StrPath,
    task: Sequence[str] = (),
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
    examiner, found, tasks = jobs.open_recording(locals())
    examiner.check_lengths(found)
    examiner.record(found, tasks).write(Path(out))
    examiner.forget()
    return Path(out)

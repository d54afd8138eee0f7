"""Traces from a server: it is opened, compared with the model, and its model's name is recorded.

A server that tokenizes differently would answer other prompts, so its tokenizer and template are
checked first. Its weights cannot be checked from outside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

from racdeploy.engines.backends.server import CompletionRequest, ServerEngine, derive_seed
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion, EngineSettings
from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.collect import CompletionSource, ShardRequest

_RECORD = "server.json"
_MAX_SHOWN = 600  # characters of a tokenization in a message
_PLAN_TIMEOUT_S = 20.0  # of an answer while planning
_JOURNAL = "completions.jsonl"
_QUESTION = "What is 12 times 34?"
_PROBES = (
    _QUESTION,
    "12+30=42, so the answer is \\boxed{42}.",
    "def add(left, right):\n    return left + right\n\n\tprint(add(2, 3))\r\n",
    "  1234567890   3.14159 1e-5\n\n\n",
    "We've done it; it's right, ISN'T it? They'll see.",
    "Привет мир. 你好世界。 नमस्ते दुनिया। مرحبا بالعالم. naïve Straße",
    "🚀 👨‍👩‍👧‍👦 ∀x∈ℝ: ⌈x⌉ ≥ x",
)


@contextmanager
def open_server(
    settings: Traces,
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    context_tokens: int,
    folder: Path,  # of the trace stage; keeps the server's model, and completions until the end
    completion_progress: CompletionProgress,
) -> Iterator[CompletionSource]:
    """Yield the server as a source of completions, after its tokenizer was checked.

    Raises:
        ArtifactError: the shards in the folder came from another model.
        EngineError: the server failed; finished completions are kept.
        UsageError: its tokenizer or template differ from the model's.
    """
    file = folder / _JOURNAL

    try:
        with _open(settings, checkpoint, context_tokens, settings.server_timeout_s) as engine:
            check_agreement(engine, encoder)
            _record(folder, settings.server_model or engine.model)

            log = CompletionLog(file)
            together = math.ceil(settings.server_concurrency / settings.batch_size)
            answer = partial(_answer, engine, log, completion_progress)
            yield CompletionSource(answer, together, resumes=False)

        file.unlink(missing_ok=True)
    except EngineError as error:
        count = len(CompletionLog(file))
        kept = f"; {count} completions are kept in {folder}" if count else ""
        error.message += kept
        error.remedy += "; then run the same command, which resumes where it ended"
        raise


def find_served_model(settings: Traces, checkpoint: Checkpoint, encoder: PromptEncoder) -> str:
    """Return the name of the server's model, after its tokenizer was checked.

    Raises:
        EngineError: no server listens there, or it does not answer in time.
        UsageError: its tokenizer or template differ from the checkpoint's.
    """
    with _open(settings, checkpoint, 1, min(_PLAN_TIMEOUT_S, settings.server_timeout_s)) as engine:
        check_agreement(engine, encoder)
        return settings.server_model or engine.model


def _open(
    settings: Traces, checkpoint: Checkpoint, context_tokens: int, timeout_s: float
) -> ServerEngine:
    return ServerEngine(
        settings.server,
        EngineSettings(context_tokens, settings.server_concurrency),
        tokenizer=TokenizerFiles(checkpoint.folder).file,
        vocabulary=checkpoint.shape.vocab_size,
        model=settings.server_model,
        key_env=settings.server_key_env,
        timeout_s=timeout_s,
    )


def _answer(
    engine: ServerEngine,
    log: CompletionLog,
    completion_progress: CompletionProgress,
    shard_requests: Sequence[ShardRequest],
) -> list[list[Completion]]:
    """Return the completions of several shards; those of an earlier run are reused."""
    shards: list[list[CompletionRequest]] = []
    for prompts, sampling in shard_requests:
        shards.append([(ids, sampling, rng_index) for rng_index, ids in enumerate(prompts)])

    requests = chain.from_iterable(shards)
    missing = [request for request in requests if _find_logged(log, request) is None]

    # A completion is logged the moment it ends, so a killed run loses only unfinished ones.
    def keep(index: int, completion: Completion) -> None:
        ids, sampling, rng_index = missing[index]
        seed = derive_seed(sampling.seed, rng_index)
        log.append(ids, seed, completion)
        completion_progress.on_tokens(index, completion.ids, completion)

    engine.complete(missing, keep)

    completions = []
    for shard in shards:
        logged = (_find_logged(log, request) for request in shard)
        completions.append([completion for completion in logged if completion])
    return completions


def _find_logged(log: CompletionLog, request: CompletionRequest) -> Completion | None:
    ids, sampling, rng_index = request
    return log.get(ids, derive_seed(sampling.seed, rng_index))


def check_agreement(engine: ServerEngine, encoder: PromptEncoder) -> None:
    """Refuse a server whose tokenizer or template differ from the model's on a probe text."""
    prompt = encoder.render(_QUESTION)
    bos_ids = encoder.encode_text(encoder.bos_token)  # llama_cpp.server puts it before every text
    added = 0 if engine.has_tokenizer else engine.count("a") - len(encoder.encode_text("a"))

    for text in (*_PROBES, prompt):
        expected = encoder.encode_text(text)
        if engine.has_tokenizer:
            actual: object = engine.tokenize(text)
            agrees = actual in (expected, bos_ids + expected)
        else:
            actual = engine.count(text)
            agrees = actual == len(expected) + added

        if not agrees:
            raise UsageError(
                "server-tokenizer-differs",
                "the server's tokenizer is not the model's: "
                f"{repr(text)[:_MAX_SHOWN]} is {repr(expected)[:_MAX_SHOWN]} here and "
                f"{repr(actual)[:_MAX_SHOWN]} there",
                remedy="serve the model that is pruned, or name the folder of the served one",
            )

    without_bos = prompt.removeprefix(encoder.bos_token)  # llama-server's tokenizer adds it
    rendered = engine.render([{"role": "user", "content": _QUESTION}])

    if rendered not in (None, prompt, without_bos, encoder.encode_text(prompt)):
        raise UsageError(
            "server-template-differs",
            "the server's chat template is not the model's: "
            f"{_QUESTION!r} is {repr(prompt)[:_MAX_SHOWN]} here and "
            f"{repr(rendered)[:_MAX_SHOWN]} there",
            remedy="start the server with the model's tokenizer files and no other chat template",
        )


def _record(folder: Path, model: str) -> None:
    """Record the server's model, or refuse to mix its answers with those of another."""
    file = folder / _RECORD
    if file.is_file() and (before := read_json(file)["model"]) != model:
        raise ArtifactError(
            "server-model-changed",
            f"the traces in {folder} were started with the served model {before!r}, "
            f"but this server has {model!r}",
            remedy=f"serve {before!r} again, or remove {folder}",
        )

    write_atomic(file, json.dumps({"model": model}))

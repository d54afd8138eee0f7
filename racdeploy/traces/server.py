"""Traces from a server: open it, compare it with the model, and remember which one it was.

A server that tokenizes differently answers other prompts than ours, so nothing is asked before it
agrees. That its weights are the model's cannot be seen from outside, unless it was told to load
them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from racdeploy.engines.backends.openai import OpenAIEngine, Request, derive_seed
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.counter import Counter
from racdeploy.engines.engine import Completion, EngineSettings
from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces import reload
from racdeploy.traces.collect import Answering, Asked

_RECORD = "server.json"
_SHOWN = 600  # characters of what a server says, and of what it should
_LOOKING_S = 20.0  # a plan waits no longer for an answer
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


@contextlib.contextmanager
def answering(
    settings: Traces,
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    context_tokens: int,
    folder: Path,  # of the trace stage; keeps the server's model, completions until all are there
    dense: Path,  # folder of the model that the server has in the end
    notify: Callable[[str], None],
    counter: Counter,
) -> Iterator[Answering]:
    """Yield a server that agrees with the model; it gets as many shards at a time as it can answer.

    Raises ArtifactError where the shards in the folder came from another model, and EngineError
    where the server failed; completions that had ended are kept.
    """
    file = folder / _JOURNAL

    weights: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if settings.server_reload:
        weights = reload.loaded(settings, checkpoint.folder, dense, notify)

    try:
        with (
            weights,
            _open(settings, checkpoint, context_tokens, settings.server_timeout_s) as engine,
        ):
            check_agreement(engine, encoder)
            _record(folder, settings.server_model or engine.model)

            log = CompletionLog(file)
            together = math.ceil(settings.server_concurrency / settings.batch)
            yield Answering(partial(_answer, engine, log, counter), together)

        file.unlink(missing_ok=True)
    except EngineError as error:
        count = len(CompletionLog(file).completions)
        kept = f"; {count} completions are kept in {folder}" if count else ""
        error.message += kept
        error.remedy += "; then run the same command, which resumes where it ended"
        raise


def find_model(settings: Traces, checkpoint: Checkpoint, encoder: PromptEncoder) -> str:
    """Return the name of the model that a server has; it tokenizes as the checkpoint does.

    Raises:
        EngineError: nothing listens there, or it does not answer in time.
        UsageError: it has another model.
    """
    with _open(settings, checkpoint, 1, min(_LOOKING_S, settings.server_timeout_s)) as engine:
        check_agreement(engine, encoder)
        return settings.server_model or engine.model


def _open(
    settings: Traces, checkpoint: Checkpoint, context_tokens: int, timeout_s: float
) -> OpenAIEngine:
    # SGLang forgets the name that it was given: what it has loaded is called by its folder.
    name = "" if settings.server_reload == "sglang" else settings.server_model
    return OpenAIEngine(
        settings.server,
        EngineSettings(context_tokens, settings.server_concurrency),
        tokenizer=TokenizerFiles(checkpoint.folder).file,
        vocabulary=checkpoint.shape.vocab_size,
        model=name,
        key_env=settings.server_key_env,
        timeout_s=timeout_s,
    )


def _answer(
    engine: OpenAIEngine,
    log: CompletionLog,
    counter: Counter,
    asked: Sequence[Asked],
) -> list[list[Completion]]:
    """Return the completions of several shards; those that an earlier run received are reused."""
    shards: list[list[Request]] = []
    for prompts, sampling in asked:
        shards.append([(ids, sampling, stream) for stream, ids in enumerate(prompts)])

    requests = [request for shard in shards for request in shard]
    missing = [request for request in requests if _find_kept(log, request) is None]

    def keep(index: int, completion: Completion) -> None:
        ids, sampling, stream = missing[index]
        seed = derive_seed(sampling.seed, stream)
        log.append(ids, seed, completion)
        counter.on_tokens(index, completion.ids, completion)

    engine.complete(missing, keep)

    answers = []

    for shard in shards:
        found = [_find_kept(log, request) for request in shard]
        answers.append([completion for completion in found if completion])

    return answers


def _find_kept(log: CompletionLog, request: Request) -> Completion | None:
    ids, sampling, stream = request
    return log.get(ids, derive_seed(sampling.seed, stream))


def check_agreement(engine: OpenAIEngine, encoder: PromptEncoder) -> None:
    """Refuse a server whose tokenizer or template differ from the model's, naming the text."""
    prompt = encoder.render(_QUESTION)
    bos_ids = encoder.encode_text(encoder.bos_token)  # llama_cpp.server puts it before every text
    lead = 0 if engine.has_tokenizer else engine.count("a") - len(encoder.encode_text("a"))

    for text in (*_PROBES, prompt):
        expected = encoder.encode_text(text)
        if engine.has_tokenizer:
            actual: object = engine.tokenize(text)
            agrees = actual in (expected, bos_ids + expected)
        else:
            actual = engine.count(text)
            agrees = actual == len(expected) + lead

        if not agrees:
            raise UsageError(
                "server-tokenizer-differs",
                "the server's tokenizer is not the model's: "
                f"{repr(text)[:_SHOWN]} is {repr(expected)[:_SHOWN]} here and "
                f"{repr(actual)[:_SHOWN]} there",
                remedy="serve the very model that is pruned, or name its folder",
            )

    without_bos = prompt.removeprefix(encoder.bos_token)  # llama-server's tokenizer adds it
    rendered = engine.render([{"role": "user", "content": _QUESTION}])

    if rendered not in (None, prompt, without_bos, encoder.encode_text(prompt)):
        raise UsageError(
            "server-template-differs",
            "the server's chat template is not the model's: "
            f"{_QUESTION!r} is {repr(prompt)[:_SHOWN]} here and "
            f"{repr(rendered)[:_SHOWN]} there",
            remedy="start the server with the model's tokenizer files and no other chat template",
        )


def _record(folder: Path, model: str) -> None:
    """Write down who answers, or refuse to mix the answers of two."""
    file = folder / _RECORD
    if file.is_file() and (before := read_json(file)["model"]) != model:
        raise ArtifactError(
            "server-model-changed",
            f"the traces in {folder} were begun with the served model {before!r}, "
            f"this server has {model!r}",
            remedy=f"serve {before!r} again, or remove {folder}",
        )

    write_atomic(file, json.dumps({"model": model}))

"""Engine for ``/v1/completions`` of a server.

Prompts are sent as token ids, so that the server's template plays no part. OpenAI's client package
is not used: it hides the fields that hold the ids.
Source: the servers' documentation and code; see :mod:`racdeploy.engines.backends.server.answers`.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from racdeploy.engines.backends.server.answers import CompletionReader, RefusedError, read_usage
from racdeploy.engines.engine import (
    Completion,
    Engine,
    EngineSettings,
    IsCancelled,
    Logits,
    OnTokens,
    Sampling,
)
from racdeploy.engines.sequence import check_ids, check_request
from racdeploy.errors import EngineError, UsageError
from racdeploy.files.reading import Json
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.plugins import require_package

CompletionRequest = tuple[Sequence[int], Sampling, int]
"""A prompt, its sampling settings, and the index of its random generator."""
OnEnd = Callable[[int, Completion], None]

_ANSWER_BYTES = 1_000_000
_TOKEN_BYTES = 256
_POLL_S = 0.05
_TEXT_TOKENIZER = "../extras/tokenize"  # llama_cpp.server's
_COUNTING_END = ("vllm", "sglang", "llamacpp")  # as /v1/models names them
# Without these, servers use their defaults or the model's generation_config.json.
_PLAIN_SAMPLING = {
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
}
# vLLM and SGLang read the first three, llama-server the other two.
_RETURN_IDS = {
    "return_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_tokens": True,
    "verbose": True,
}


class ServerEngine(Engine):
    """A served model. It has no logits and supports no thinking budget.

    Args:
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        settings: ``parallel`` is the number of concurrent requests, ``context_tokens`` the maximum
            of a sequence.
        tokenizer: the model's ``tokenizer.json``, for servers that return only text.
        vocabulary: number of the model's token ids; 0 takes what the server reports, or no limit.
        model: name of the model; empty takes the only one.
        key_env: environment variable that holds the API key; empty sends none.
        timeout_s: maximum time of one completion.

    Raises:
        UsageError: wrong address, key or model name.
        EngineError: the server cannot be reached.
    """

    def __init__(
        self,
        url: Path | str,
        settings: EngineSettings,
        *,
        tokenizer: Path | None = None,
        vocabulary: int = 0,
        model: str = "",
        key_env: str = "",
        timeout_s: float = 1800.0,
    ) -> None:
        require_package("httpx")
        from racdeploy.engines.backends.server.http import Client

        self.stats = {}
        self.info = {}
        self._settings = settings
        self._client = Client(str(url), key_env, timeout_s)
        self._tokenizer = read_tokenizer(tokenizer) if tokenizer else None

        card = self._choose_model(model)
        self.model = str(card["id"])
        self._vocabulary = vocabulary or _vocabulary(card)

        self._tokenizer_path = self._find_tokenizer()
        self._sends_text = self._tokenizer_path == _TEXT_TOKENIZER

        # Whether the server counts end-of-sequence among the generated tokens; None if unknown.
        counts_end = False if self._sends_text else card.get("owned_by") in _COUNTING_END or None
        self._reader = CompletionReader(self._tokenizer, self._vocabulary, counts_end)

    @property
    def has_tokenizer(self) -> bool:
        """True if the server has an endpoint that tokenizes."""
        return self._tokenizer_path is not None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: IsCancelled | None = None,
    ) -> list[Completion]:
        """Complete every prompt; ``on_tokens`` gets whole completions. See :meth:`complete`."""
        completions = [Completion((), "cancelled")] * len(prompts)

        def on_end(index: int, completion: Completion) -> None:
            completions[index] = completion
            if on_tokens:
                on_tokens(index, completion.ids, completion)

        requests = [(ids, sampling, sampling.rng_index(i)) for i, ids in enumerate(prompts)]
        self.complete(requests, on_end, cancelled)
        return completions

    def complete(
        self,
        requests: Sequence[CompletionRequest],
        on_end: OnEnd,
        cancelled: IsCancelled | None = None,
    ) -> None:
        """Send all requests, up to ``parallel`` at a time; ``cancelled`` aborts them.

        Args:
            on_end: gets the index of a request and its completion, in the order in which they end.

        Raises:
            EngineError: the server failed, or does not return exact token ids; completions that
                have ended are passed to ``on_end`` first.
        """
        for index, (ids, sampling, _) in enumerate(requests):
            self._check(f"prompt {index}", ids, sampling)

        slots = asyncio.Semaphore(self._settings.parallel)

        async def complete(request: CompletionRequest) -> Completion:
            async with slots:
                return await self._complete(request)

        with self._client.loop() as loop:
            pending: dict[Future[Completion], int] = {}
            for index, request in enumerate(requests):
                pending[loop.start_task_soon(complete, request)] = index

            while pending and not (cancelled and cancelled()):
                done, _ = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                # Completions first: result() of a failed request ends this loop.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    on_end(pending.pop(future), future.result())

            loop.call(loop.stop, True)  # cancels pending requests

    def _check(self, name: str, ids: Sequence[int], sampling: Sampling) -> None:
        check_ids(ids, name, self._settings.context_tokens - 1, self._vocabulary)
        check_request((), sampling, self._settings.context_tokens, self._vocabulary)
        if sampling.budget is not None:
            raise UsageError(
                "server-without-budget",
                "a server cannot limit the thinking to a number of tokens",
                remedy="collect without a thinking budget, or with the transformers engine",
            )
        if any(sampling.resume_from):
            raise UsageError(
                "server-cannot-resume",
                "a server cannot resume a completion",
                remedy="generate it from the start",
            )

    def logits(self, ids: Sequence[int]) -> Logits:
        """Raise UsageError: a server returns no logits."""
        raise UsageError(
            "server-without-logits",
            "a server returns no logits",
            remedy="open the artifact with its own engine",
        )

    def tokenize(self, text: str) -> list[int] | None:
        """Return the server's ids of a text, or None if it has no such endpoint.

        Special tokens are parsed; llama_cpp.server adds its own.
        """
        path = self._tokenizer_path
        return None if path is None else self._client.run(self._ask_ids, path, text)

    def count(self, text: str) -> int:
        """Return the number of prompt tokens of a text, with those that the server adds."""
        body = {"model": self.model, "prompt": text, "max_tokens": 1, "temperature": 0.0}
        return read_usage(self._client.ask("completions", body), "prompt_tokens")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | list[int] | None:
        """Return the prompt by the server's template as text or ids, or None if it returns none."""
        body = {"model": self.model, "messages": list(messages), "add_generation_prompt": True}

        for path, key in (("../apply-template", "prompt"), ("../tokenize", "tokens")):
            try:
                prompt = self._client.ask(path, body).get(key)
            except RefusedError:
                continue

            if prompt and isinstance(prompt, str | list):
                return prompt

        return None

    async def _complete(self, request: CompletionRequest) -> Completion:
        ids, sampling, _ = request
        body = {
            **self._write_request(request),
            "prompt": await self._write_text(ids) if self._sends_text else list(ids),
            # No top-k limit: llama_cpp.server refuses -1, older vLLM 0.
            "top_k": 0 if self._sends_text else -1,
            "stop_token_ids": list(sampling.stop_ids),
            # The keys of all servers together; each ignores keys that it does not know.
            **_PLAIN_SAMPLING,
            **_RETURN_IDS,
        }

        max_bytes = max_answer_bytes(len(ids), body["max_tokens"])
        answer = await self._client.request("completions", body, max_bytes=max_bytes)
        return self._reader.read(answer, ids, sampling.stop_ids, body["max_tokens"])

    def _write_request(self, request: CompletionRequest) -> Json:
        ids, sampling, rng_index = request
        return {
            "model": self.model,
            "max_tokens": min(sampling.max_new_tokens, self._settings.context_tokens - len(ids)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": derive_seed(sampling.seed, rng_index),
        }

    async def _write_text(self, ids: Sequence[int]) -> str:
        """Return a text that the server tokenizes to these ids, of which it may add the first."""
        if self._tokenizer is None:
            raise EngineError(
                "server-needs-tokenizer",
                f"{self._client.url} takes no token ids, and there is no tokenizer to send text",
                remedy="give the engine the model's tokenizer.json",
            )

        # Where the server adds the beginning-of-sequence id itself, the text starts behind it.
        for start in (0, 1):
            text = self._tokenizer.decode(ids[start:])
            if await self._ask_ids(_TEXT_TOKENIZER, text) == list(ids):
                return text

        raise EngineError(
            "server-tokens-differ",
            f"the server tokenizes the prompt that ends with {text[-40:]!r} differently, "
            "and takes no token ids",
            remedy="use vLLM, SGLang or llama-server, which take token ids",
        )

    def _choose_model(self, name: str) -> Json:
        try:
            data = self._client.ask("models").get("data")
        except RefusedError as error:
            raise UsageError(
                "no-api-at-address",
                error.message,
                remedy="give the address of the API, which usually ends in /v1",
            ) from error

        models = data if isinstance(data, list) else []
        cards = [card for card in models if isinstance(card, dict) and "id" in card]

        chosen = [card for card in cards if name in ("", card["id"])]
        if len(chosen) == 1:
            return chosen[0]

        problem = f"no model {name!r}" if name else f"{len(cards)} models, and none is named"
        names = ", ".join(str(card["id"]) for card in cards) or "none"
        raise UsageError(
            "served-model-unclear",
            f"{self._client.url} has {problem}",
            remedy=f"set traces.server_model to one of: {self._client.quote(names)}",
        )

    def _find_tokenizer(self) -> str | None:
        for path in ("../tokenize", _TEXT_TOKENIZER):
            try:
                self._client.run(self._ask_ids, path, "2 + 2")
            except RefusedError:
                continue
            return path
        return None

    async def _ask_ids(self, path: str, text: str) -> list[int]:
        """Return the ids of a text from an endpoint; the request has the keys of all servers."""
        body = {
            "model": self.model,
            # vLLM
            "prompt": text,
            "add_special_tokens": False,
            # llama-server
            "content": text,
            "add_special": False,
            "parse_special": True,
            # llama_cpp.server
            "input": text,
        }

        answer = await self._client.request(path, body)

        ids = answer.get("tokens")
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise EngineError(
                "odd-server-answer",
                f"{self._client.url} answers {path} without token ids",
                remedy="check the server's log and version",
            )

        return ids


def max_answer_bytes(prompt_tokens: int, new_tokens: int) -> int:
    """Return the maximum bytes of an answer: 256 for each token, and 1 MB for all else."""
    return _ANSWER_BYTES + _TOKEN_BYTES * (prompt_tokens + new_tokens)


def derive_seed(seed: int, rng_index: int) -> int:
    """Return the seed of one sequence: 31 bits, which every server accepts."""
    digest = hashlib.sha256(f"{seed}:{rng_index}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _vocabulary(card: Json) -> int:
    """Return the vocabulary size that llama-server reports, else sys.maxsize, no limit.

    Servers refuse unknown ids themselves.
    """
    meta = card.get("meta")
    size = meta.get("n_vocab") if isinstance(meta, dict) else None
    return size if type(size) is int else sys.maxsize

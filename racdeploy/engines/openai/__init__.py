"""Any server with OpenAI's ``/v1/completions``: vLLM, SGLang, llama-server, llama_cpp.server.

``path`` is the address of the API. Prompts go out as token ids, so that the model's own template decides; only
llama_cpp.server takes no ids, and gets text that it was seen to tokenize to them. A request carries its own seed,
hence asking again gives the same completion on a server whose sampling is reproducible. Written with the standard
library: a few JSON requests do not earn the base install a client package, which would render prompts by itself
and hide the fields that hold the ids.
Source: the servers' documentation and code; see ``_openai_answers``.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from racdeploy.decoding.engine import Completion, Engine, EngineSettings, Sampling
from racdeploy.decoding.sequence import check_ids, check_request
from racdeploy.engines.openai.answers import Reader, prompt_tokens
from racdeploy.engines.openai.http import Client, RefusedError
from racdeploy.errors import EngineError, UsageError

__all__ = ["ACCEL", "OpenAIEngine", "Request", "derived_seed", "open_engine"]

ACCEL = False
Request = tuple[
    Sequence[int], Sampling, int
]  # a prompt, how its completion is sampled, and its random stream
_POLL_S = 0.05
_TEXT_TOKENIZER = "../extras/tokenize"
_COUNT_END = ("vllm", "sglang", "llamacpp")  # as /v1/models names them
# Servers have defaults of their own for these, some from the model's generation_config.json.
_PLAIN_SAMPLING = {
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
}
# vLLM and SGLang: return_token_ids, and special tokens in the text; llama-server: the other two.
_EXACT_IDS = {
    "return_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_tokens": True,
    "verbose": True,
}


class OpenAIEngine(Engine):
    """A model behind an address. It gives no logits and takes no thinking budget.

    ``model`` is the name that requests carry, ``tells_ids`` whether the server has an endpoint that tokenizes.

    Args:
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        settings: ``parallel`` requests are under way together; ``context_tokens`` caps a sequence.
        tokenizer: the model's ``tokenizer.json``, for servers that return text alone.
        vocabulary: number of the model's token ids; 0 takes what the server tells, or no limit.
        model: name of the model to ask; empty takes the only one there is.
        key_env: environment variable that holds the key; empty sends none.
        timeout_s: longest wait for one completion.

    Raises:
        UsageError: wrong address, key or model name.
        EngineError: the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        settings: EngineSettings,
        *,
        tokenizer: Path | None = None,
        vocabulary: int = 0,
        model: str = "",
        key_env: str = "",
        timeout_s: float = 1800.0,
    ) -> None:
        self.stats, self.about = {}, {}
        self._settings = settings
        self._client = Client(url, key_env, timeout_s)
        card = self._card(model)
        self.model = str(card["id"])
        self._vocabulary = vocabulary or _vocabulary(card)
        self._own = _tokenizer(tokenizer) if tokenizer else None
        self._tokenized = self._find_tokenizer()
        self._takes_text = self._tokenized == _TEXT_TOKENIZER
        self._reader = Reader(self._own, self._vocabulary, self._counts_end(card))

    @property
    def tells_ids(self) -> bool:
        """Whether the server has an endpoint that tokenizes."""
        return self._tokenized is not None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: Callable[[int, Sequence[int]], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; a completion is told whole, when it has ended.

        Raises:
            UsageError: a thinking budget was asked for.
            EngineError: the server failed, or exact token ids cannot be had from it.
        """
        completions = [Completion((), "cancelled")] * len(prompts)

        def on_end(index: int, completion: Completion) -> None:
            completions[index] = completion
            if on_tokens:
                on_tokens(index, completion.ids)

        self.complete(
            [(ids, sampling, sampling.stream(i)) for i, ids in enumerate(prompts)],
            on_end,
            cancelled,
        )
        return completions

    def complete(
        self,
        requests: Sequence[Request],
        on_end: Callable[[int, Completion], None],
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Make every request; each completion is given with the index of its request, in the order in which they end.

        Raises:
            UsageError: a thinking budget was asked for.
            EngineError: the server failed, or exact token ids cannot be had from it; what had ended is given first.
        """
        for index, (ids, sampling, _) in enumerate(requests):
            self._check(f"prompt {index}", ids, sampling)
        over = threading.Event()
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            pending: dict[Future[Completion], int] = {}
            try:
                for index, request in enumerate(requests):
                    pending[pool.submit(self._complete, request, over)] = index
                while pending and not (cancelled and cancelled()):
                    done, _ = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda future: future.exception() is not None):
                        on_end(pending.pop(future), future.result())
            finally:
                over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._client.interrupt()

    def _check(self, name: str, ids: Sequence[int], sampling: Sampling) -> None:
        check_ids(ids, name, self._settings.context_tokens - 1, self._vocabulary)
        check_request((), sampling, self._settings.context_tokens, self._vocabulary)
        if sampling.budget is not None:
            raise UsageError(
                "a server cannot end the thinking after a number of tokens",
                remedy="collect without a thinking budget, or with the transformers engine",
            )

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Refuse: a server keeps its logits to itself."""
        raise UsageError("a server gives no logits", remedy="open the artifact on its own engine")

    def tokenize(self, text: str) -> list[int] | None:
        """Return the server's ids of a text, None where no endpoint gives them.

        Special tokens are parsed; llama_cpp.server adds its own.

        Raises:
            EngineError: the endpoint answers with something else.
        """
        return self._ids_of(self._tokenized, text) if self._tokenized else None

    def count(self, text: str) -> int:
        """Return how many prompt tokens the server makes of a text, with those that it adds."""
        body = {"model": self.model, "prompt": text, "max_tokens": 1, "temperature": 0.0}
        return prompt_tokens(self._client.post("completions", body))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | list[int] | None:
        """Return the prompt that the server's own template makes: text or ids, None where it does not say."""
        body = {"model": self.model, "messages": list(messages), "add_generation_prompt": True}
        for path, key in (("../apply-template", "prompt"), ("../tokenize", "tokens")):
            try:
                prompt = self._client.post(path, body).get(key)
            except RefusedError:
                continue
            if prompt and isinstance(prompt, str | list):
                return prompt
        return None

    def close(self) -> None:
        """Break off whatever is under way; again is harmless."""
        self._client.interrupt()

    def _complete(self, request: Request, over: threading.Event) -> Completion:
        ids, sampling, stream = request
        cap = min(sampling.max_new_tokens, self._settings.context_tokens - len(ids))
        try:
            prompt = self._text(ids, over) if self._takes_text else list(ids)
            body = self._request(prompt, sampling, cap) | {
                "seed": derived_seed(sampling.seed, stream)
            }
            answer = self._client.post("completions", body, over)
        except CancelledError:
            return Completion((), "cancelled")
        return self._reader.completion(answer, ids, sampling.stop_ids, cap)

    def _request(self, prompt: str | list[int], sampling: Sampling, cap: int) -> dict[str, Any]:
        """Return a request in the words of every server at once; they pass over what they do not know."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": cap,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0
            if self._takes_text
            else -1,  # off; llama_cpp.server refuses -1, older vLLM 0
            "stop_token_ids": list(sampling.stop_ids),
            **_PLAIN_SAMPLING,
            **_EXACT_IDS,
        }

    def _text(self, ids: Sequence[int], over: threading.Event) -> str:
        """Return a text that the server tokenizes to these ids; it may add the first one itself."""
        if self._own is None:
            raise EngineError(
                f"{self._client.url} takes no token ids, and there is no tokenizer to write text with",
                remedy="give the engine the model's tokenizer.json",
            )
        for start in (0, 1):
            text = str(self._own.decode(list(ids[start:]), skip_special_tokens=False))
            if self._ids_of(_TEXT_TOKENIZER, text, over) == list(ids):
                return text
        raise EngineError(
            f"the server tokenizes the prompt that ends with {text[-40:]!r} in another way, and takes no token ids",
            remedy="use vLLM, SGLang or llama-server, which take them",
        )

    def _card(self, model: str) -> dict[str, Any]:
        """Return what the server says about the model to ask."""
        try:
            found = self._client.get("models").get("data")
        except RefusedError as error:
            raise UsageError(
                error.message, remedy="give the address of the API, which mostly ends in /v1"
            ) from error
        cards = (
            [c for c in found if isinstance(c, dict) and "id" in c]
            if isinstance(found, list)
            else []
        )
        chosen = [card for card in cards if card["id"] == model] if model else cards
        if len(chosen) != 1:
            names = ", ".join(str(card["id"]) for card in cards) or "none"
            problem = (
                f"has no model {model!r}"
                if model
                else f"has {len(cards)} models, and none is named"
            )
            raise UsageError(
                f"{self._client.url} {problem}",
                remedy=f"set traces.server_model to one of: {names}",
            )
        return chosen[0]

    def _counts_end(self, card: Mapping[str, Any]) -> bool | None:
        """Return whether the server counts end-of-sequence among generated tokens, None if it is a stranger."""
        return False if self._takes_text else card.get("owned_by") in _COUNT_END or None

    def _find_tokenizer(self) -> str | None:
        for path in ("../tokenize", _TEXT_TOKENIZER):
            try:
                self._ids_of(path, "2 + 2")
            except RefusedError:
                continue
            return path
        return None

    def _ids_of(self, path: str, text: str, over: threading.Event | None = None) -> list[int]:
        """Ask an endpoint for the ids of a text, in the words of every server at once."""
        body = {
            "model": self.model,
            "prompt": text,
            "add_special_tokens": False,
            "content": text,
            "add_special": False,
            "parse_special": True,
            "input": text,
        }
        ids = self._client.post(path, body, over).get("tokens")
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise EngineError(
                f"{self._client.url} answers {path} without token ids",
                remedy="look at the server's log and version",
            )
        return ids


def open_engine(path: Path | str, settings: EngineSettings) -> OpenAIEngine:
    """Reach a server that returns token ids and needs no key; see :class:`OpenAIEngine` for others."""
    return OpenAIEngine(str(path), settings)


def derived_seed(seed: int, index: int) -> int:
    """Return the seed of one sequence: 31 bits, which every server takes."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4]) >> 1


def _tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer, without the limits that some files carry."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _vocabulary(card: Mapping[str, Any]) -> int:
    """Return the vocabulary that llama-server tells, or no limit: the server refuses strange ids itself."""
    meta = card.get("meta")
    size = meta.get("n_vocab") if isinstance(meta, dict) else None
    return size if type(size) is int else sys.maxsize

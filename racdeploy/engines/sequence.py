"""Generation of one sequence: sample a token, limit the thinking, detect the end.

Every engine uses it, so that greedy ties, sampling, budgets and finish reasons are the same in all.
A sampled token depends only on seed, index of the random generator and the sequence's own logits.
Source: nucleus sampling, arXiv 1904.09751; budget forcing, arXiv 2501.19393; a penalty on words of
hesitation, arXiv 2606.00206.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from racdeploy.engines.engine import Completion, FinishReason, Logits, Sampling, ThinkingBudget
from racdeploy.errors import ContextError, EngineError, PromptError, UsageError

_MIN_WEIGHT = 1e-4  # relative to the likeliest token


class Grammar(Protocol):
    """What may come next in one answer."""

    def allows(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which ids may come next."""

    def accept(self, token: int) -> None:
        """Move past an allowed token."""


class GeneratedSequence:
    """A prompt and its growing completion.

    The engine feeds the pending ids to the model and removes them, calls :meth:`step` with the
    logits of the last one, and stops when ``finish_reason`` is set. ``index`` is the prompt's index
    in the call. Prompt and completion together have at most ``context_tokens``. Ids of an earlier
    run are taken over, and each consumes its random number again. ``grammar`` is that of the
    sampling's schema.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        context_tokens: int,
        grammar: Grammar | None = None,
    ) -> None:
        if sampling.schema is not None and grammar is None:
            raise UsageError(
                "engine-without-grammar",
                "this engine has no grammar to keep a JSON schema with",
                remedy="take the model as GGUF, for llama.cpp",
            )
        self._grammar = grammar
        self.index = index
        self.prompt_tokens = len(prompt_ids)
        self.ids: list[int] = []
        self._counts = Counter[int]()  # generated tokens, without forced ones
        self.pending_ids: list[int] = list(prompt_ids)
        self.finish_reason: FinishReason | None = None
        self.forced_at: int | None = None

        self._sampling = sampling
        self._cap = min(sampling.max_new_tokens, context_tokens - len(prompt_ids))

        seeds = [sampling.seed, sampling.rng_index(index)]
        self._random = np.random.Generator(np.random.PCG64(seeds))

        self._budget = sampling.budget
        self._thinking_from = 0 if self._budget and self._budget.starts_open else None

        self._force_close()  # a budget of 0 ends at once
        self._resume(sampling.resumed_ids(index))
        self.pending_ids.extend(self.ids)

    def step(self, logits_V: Logits) -> list[int]:
        """Append the next token, and a forced close tag where the budget ends; return both."""
        assert self.finish_reason is None, "a finished sequence takes no step"

        length = len(self.ids)
        penalized_V = self._penalize(logits_V)
        token = self._draw(penalized_V)

        # A mask of the whole vocabulary takes long, and most tokens are allowed without one.
        grammar = self._find_grammar(token)
        if grammar and not grammar.allows(np.array([token])).all():
            allowed_V = grammar.allows(np.arange(penalized_V.size))
            token = self._draw(np.where(allowed_V, penalized_V, -np.inf))

        self._append(token)

        new_ids = self.ids[length:]
        self.pending_ids.extend(new_ids)
        return new_ids

    @property
    def initial_forced_ids(self) -> list[int]:
        """Ids that were forced before any step, without those of an earlier run."""
        return self.ids[len(self._sampling.resumed_ids(self.index)) :]

    def cancel(self) -> None:
        """End the sequence now, unless it has ended."""
        self.finish_reason = self.finish_reason or "cancelled"

    def completion(self) -> Completion:
        """Return the completion of a finished sequence."""
        assert self.finish_reason is not None, "the sequence has not finished"
        return Completion(tuple(self.ids), self.finish_reason, self.forced_at)

    @property
    def final_completion(self) -> Completion | None:
        """Completion of a finished sequence, else None."""
        return self.completion() if self.finish_reason else None

    def _draw(self, logits_V: Logits) -> int:
        sampling = self._sampling
        settings = (sampling.temperature, sampling.top_p, self._random)
        return sample_token(logits_V, *settings, sampling.top_k, sampling.min_p)

    def _find_grammar(self, token: int) -> Grammar | None:
        """Return the grammar if a next token is part of the answer, not of a thought or its tag."""
        budget = self._budget
        first = self.ids[0] if self.ids else token
        has_opened = budget and (self._thinking_from is not None or first in budget.open_ids[:1])
        return None if has_opened else self._grammar

    def _resume(self, ids: Sequence[int]) -> None:
        """Append the ids of an earlier run; random generator and budget follow."""
        while len(self.ids) < len(ids) and self.finish_reason is None:
            if self._sampling.temperature:
                self._random.random()
            self._append(ids[len(self.ids)])

        # Tokens that are forced here must be those that were forced there.
        if self.ids[: len(ids)] != list(ids):
            raise EngineError(
                "resumed-tokens-differ",
                f"an earlier run generated other tokens of prompt {self.index} than these settings",
                remedy="start again: remove the files of the earlier run",
            )

    def _append(self, token: int) -> None:
        """Append a token and the ids that it forces; set the finish reason."""
        grammar = self._find_grammar(token)
        self.ids.append(token)
        self._counts[token] += 1

        if token in self._sampling.stop_ids:
            self.finish_reason = "stop"
            return

        if grammar:
            grammar.accept(token)
        self._track_thinking()
        self._force_close()
        if len(self.ids) >= self._cap:
            self.finish_reason = "length"

    def _penalize(self, logits_V: Logits) -> Logits:
        """Return the logits less all penalties, that on hesitation only while the model thinks."""
        frequency, presence = self._sampling.frequency_penalty, self._sampling.presence_penalty
        if (frequency or presence) and self._counts:
            logits_V = logits_V.copy()
            counts = np.fromiter(self._counts.values(), logits_V.dtype)
            logits_V[list(self._counts)] -= frequency * counts + presence

        budget = self._budget
        if budget is None or self._thinking_from is None or not budget.hesitation_penalty:
            return logits_V

        biased_V = logits_V.copy()
        biased_V[list(budget.hesitation_ids)] -= budget.hesitation_penalty
        return biased_V

    def _track_thinking(self) -> None:
        """Detect a tag that the last token completes; later thinking has no budget."""
        if self._budget is None:
            return
        if self._thinking_from is None:
            if ends_with(self.ids, self._budget.open_ids):
                self._thinking_from = len(self.ids)
        elif ends_with(self.ids, self._budget.close_ids, self._thinking_from):
            self._budget = None

    def _force_close(self) -> None:
        """After the budget, append closing message and tag, or the rest of a tag that has begun."""
        budget = self._budget
        if budget is None or self._thinking_from is None or budget.max_tokens is None:
            return
        if len(self.ids) - self._thinking_from < budget.max_tokens:
            return

        # A message in the middle of a tag would break it: complete a tag that has begun.
        generated = count_partial_match(self.ids, budget.close_ids, self._thinking_from)
        rest = budget.close_ids[generated:]
        room = self._cap - len(self.ids)
        forced = (rest if generated else budget.closing_message_ids + budget.close_ids)[:room]
        self.forced_at = len(self.ids) - generated if forced else None
        self.ids.extend(forced)
        self._budget = None

        if len(self.ids) >= self._cap:
            self.finish_reason = "length"


def ends_with(ids: Sequence[int], wanted: Sequence[int], start: int = 0) -> bool:
    """Return whether the ids from ``start`` on end with ``wanted``."""
    first = len(ids) - len(wanted)
    return first >= start and list(ids[first:]) == list(wanted)


def count_partial_match(ids: Sequence[int], wanted: Sequence[int], start: int) -> int:
    """Return how many of the last ids, from ``start`` on, match the beginning of ``wanted``."""
    count = len(wanted) - 1
    while not ends_with(ids, wanted[:count], start):
        count -= 1
    return count


def sample_token(
    logits_V: Logits,
    temperature: float,
    top_p: float,
    random: np.random.Generator,
    top_k: int = 0,
    min_p: float = 0.0,
) -> int:
    """Return the next token: the first largest logit at temperature 0, else a sampled one.

    Weights are float32, as the logits are, and sums float64: with a large vocabulary exponentials
    in float64 took 40 % of a decoding step.

    Args:
        top_p: smallest probability mass to sample from, in (0, 1], after both other limits.
        random: not used at temperature 0.
        top_k: number of most likely tokens to sample from; 0 is all.
        min_p: smallest probability to sample, as a share of the largest one.
    """
    best = int(np.argmax(logits_V))
    if not np.isfinite(logits_V[best]):
        raise EngineError(
            "logits-not-finite",
            f"the model's logits are not finite (token {best}: {logits_V[best]})",
            remedy="the weights are damaged or overflow; export again, or with another quant",
        )

    if temperature == 0.0:
        return best

    weight_V = np.exp((logits_V - logits_V[best]) / np.float32(temperature))
    weight_V[weight_V < min_p] = 0.0
    if 0 < top_k < weight_V.size:
        weight_V[weight_V < np.partition(weight_V, -top_k)[-top_k]] = 0.0
    uniform = random.random()

    if top_p == 1.0:
        return _sample(np.arange(weight_V.size), weight_V, uniform)

    # Sorting the whole vocabulary is slow. Likely tokens alone give the same nucleus if they hold
    # its mass; else all are sorted.
    wanted = top_p * weight_V.sum(dtype=np.float64)
    likely = np.flatnonzero(weight_V > _MIN_WEIGHT)
    if weight_V[likely].sum(dtype=np.float64) < wanted:
        likely = np.arange(weight_V.size)

    order = likely[np.argsort(-weight_V[likely], kind="stable")]
    cumulative = np.cumsum(weight_V[order], dtype=np.float64)
    count = int(np.searchsorted(cumulative, wanted)) + 1
    nucleus = order[:count]
    return _sample(nucleus, weight_V[nucleus], uniform)


def _sample(ids: NDArray[np.int64], weights: NDArray[np.float32], uniform: float) -> int:
    """Return the id at ``uniform``, in [0, 1), of the cumulative weight."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(index, ids.size - 1)])


def check_request(
    prompts: Sequence[Sequence[int]], sampling: Sampling, context_tokens: int, vocabulary: int
) -> None:
    """Raise for prompts and settings that no engine can carry out; nothing is ever clipped."""
    for index, ids in enumerate(prompts):
        check_ids(ids, f"prompt {index}", context_tokens - 1, vocabulary)
    if problem := _find_problem(sampling, vocabulary):
        raise UsageError(
            "bad-generation-setting",
            f"cannot generate: {problem}",
            remedy="correct the generation settings",
        )


def check_ids(ids: Sequence[int], subject: str, limit: int, vocabulary: int) -> None:
    """Raise where there are no token ids, too many, or ids outside the vocabulary."""
    if not ids:
        raise PromptError(
            "empty-prompt", f"{subject} has no tokens", remedy="render the chat template first"
        )

    check_length(len(ids), f"{subject} has", limit)
    if min(ids) < 0 or max(ids) >= vocabulary:
        unknown = next(token for token in ids if not 0 <= token < vocabulary)
        raise PromptError(
            "unknown-token-id",
            f"{subject} holds token id {unknown}, the model has ids 0 to {vocabulary - 1}",
            remedy="use the tokenizer that belongs to this model",
        )


def measure_text(text: str) -> int:
    """Return the bytes of a text in UTF-8; PromptError for one that is not Unicode."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise PromptError(
            "text-not-unicode",
            f"the text is not Unicode: {error}",
            remedy="remove lone surrogates",
        ) from error


def check_length(
    tokens: int, subject: str, limit: int, remedy: str = "shorten the text, or raise context_tokens"
) -> None:
    """Raise ContextError for more tokens than the context takes; ``subject`` has the verb."""
    if tokens > limit:
        raise ContextError(
            "prompt-too-long",
            f"{subject} {tokens} tokens, the context takes at most {limit}",
            remedy=remedy,
        )


def _find_problem(sampling: Sampling, vocabulary: int) -> str:
    if sampling.max_new_tokens < 1:
        return f"max_new_tokens is {sampling.max_new_tokens}, must be at least 1"
    if not 0.0 <= sampling.temperature < np.inf:
        return f"temperature is {sampling.temperature}, must be finite and not negative"
    if not 0.0 < sampling.top_p <= 1.0:
        return f"top_p is {sampling.top_p}, must be above 0 and at most 1"
    if not 0.0 <= sampling.min_p <= 1.0:
        return f"min_p is {sampling.min_p}, must be from 0 to 1"
    if not np.isfinite([sampling.frequency_penalty, sampling.presence_penalty]).all():
        return "a penalty is not finite"
    if sampling.seed < 0:
        return f"seed is {sampling.seed}, must not be negative"
    if sampling.budget is not None and not _is_usable(sampling.budget, vocabulary):
        return "the thinking budget is unusable"

    return ""


def _is_usable(budget: ThinkingBudget, vocabulary: int) -> bool:
    if (budget.max_tokens or 0) < 0 or not budget.close_ids:
        return False
    if not budget.open_ids and not budget.starts_open:
        return False
    if not np.isfinite(budget.hesitation_penalty):
        return False

    tags = budget.close_ids + budget.open_ids
    named = tags + budget.closing_message_ids + budget.hesitation_ids
    return all(0 <= token < vocabulary for token in named)

"""One sequence being generated: choose a token, steer and end the thinking, know when to stop.

Every engine uses it, so greedy ties, sampling, budgets and finish reasons mean the same everywhere.
The draw of a sequence depends on its seed, its stream and its own logits only.
Source: nucleus sampling, arXiv 1904.09751; budget forcing, arXiv 2501.19393; a penalty on words of
hesitation, arXiv 2606.00206.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from racdeploy.engines.engine import Completion, FinishReason, Logits, Sampling, ThinkingBudget
from racdeploy.errors import ContextError, EngineError, PromptError

_UNLIKELY = 1e-4  # of the likeliest token


class Sequence:
    """A prompt and the completion that grows behind it.

    The engine feeds ``unfed`` (emptying it as it goes), then calls :meth:`step` with the logits of
    the last fed token, and stops when ``finish_reason`` is set. The completion is capped where it
    and the prompt reach ``context_tokens``; ``index`` is the prompt's place in the call. Ids that
    the sampling says were begun with are taken as they are, and draw what they drew.
    """

    def __init__(
        self, index: int, prompt_ids: SequenceOf[int], sampling: Sampling, context_tokens: int
    ) -> None:
        self.index = index
        self.prompt_tokens = len(prompt_ids)
        self.ids: list[int] = []
        self.unfed: list[int] = list(prompt_ids)
        self.finish_reason: FinishReason | None = None
        self.forced_at: int | None = None

        self._sampling = sampling
        self._cap = min(sampling.max_new_tokens, context_tokens - len(prompt_ids))

        seeds = [sampling.seed, sampling.stream(index)]
        self._random = np.random.Generator(np.random.PCG64(seeds))

        self._budget = sampling.budget
        self._thinking_from = 0 if self._budget and self._budget.starts_open else None

        self._force_close()  # a budget of nothing closes at once
        self._begin(sampling.begun_by(index))
        self.unfed.extend(self.ids)

    def step(self, logits_V: Logits) -> list[int]:
        """Append the next token, and a close tag where the budget ends; return the new ids."""
        assert self.finish_reason is None, "a finished sequence takes no step"

        length = len(self.ids)
        steered_V = self._steer(logits_V)
        token = choose(steered_V, self._sampling.temperature, self._sampling.top_p, self._random)
        self._take(token)

        new_ids = self.ids[length:]
        self.unfed.extend(new_ids)
        return new_ids

    @property
    def forced_first(self) -> list[int]:
        """Ids that were forced before any step, and that no earlier run had."""
        return self.ids[len(self._sampling.begun_by(self.index)) :]

    def cancel(self) -> None:
        """End the sequence here, unless it has ended already."""
        self.finish_reason = self.finish_reason or "cancelled"

    def completion(self) -> Completion:
        """Return what was generated so far."""
        assert self.finish_reason is not None, "the sequence has not finished"
        return Completion(tuple(self.ids), self.finish_reason, self.forced_at)

    @property
    def ended(self) -> Completion | None:
        """The completion, once it has ended."""
        return self.completion() if self.finish_reason else None

    def _begin(self, begun: SequenceOf[int]) -> None:
        """Go through what was generated before as if it were now, draws and tags included."""
        while len(self.ids) < len(begun) and self.finish_reason is None:
            if self._sampling.temperature:
                self._random.random()
            self._take(begun[len(self.ids)])

        if self.ids[: len(begun)] != list(begun):
            raise EngineError(
                "resumed-tokens-differ",
                f"what prompt {self.index} had generated is not what these settings generate",
                remedy="begin it anew: remove what the earlier run left",
            )

    def _take(self, token: int) -> None:
        """Append a token, and what it forces; notice the end."""
        self.ids.append(token)

        if token in self._sampling.stop_ids:
            self.finish_reason = "stop"
            return

        self._track_thinking()
        self._force_close()
        if len(self.ids) >= self._cap:
            self.finish_reason = "length"

    def _steer(self, logits_V: Logits) -> Logits:
        """Return the logits, while the model thinks with what its budget adds and subtracts."""
        budget = self._budget
        if budget is None or self._thinking_from is None:
            return logits_V

        bias = budget.bias_at(len(self.ids) - self._thinking_from)
        if not bias and not budget.hesitation_penalty:
            return logits_V

        steered_V = logits_V.copy()
        steered_V[list(budget.hesitation_ids)] -= budget.hesitation_penalty
        steered_V[budget.close_ids[0]] += bias
        return steered_V

    def _track_thinking(self) -> None:
        """Notice a tag that the last token completes; a reopened thought has no budget any more."""
        if self._budget is None:
            return
        if self._thinking_from is None:
            if ends_with(self.ids, self._budget.open_ids):
                self._thinking_from = len(self.ids)
        elif ends_with(self.ids, self._budget.close_ids, self._thinking_from):
            self._budget = None

    def _force_close(self) -> None:
        """Append what ends the thought, or the rest of a tag that has begun, after the budget."""
        budget = self._budget
        if budget is None or self._thinking_from is None or budget.max_tokens is None:
            return
        if len(self.ids) - self._thinking_from < budget.max_tokens:
            return

        begun = count_begun(self.ids, budget.close_ids, self._thinking_from)
        whole = budget.closing_ids + budget.close_ids
        room = self._cap - len(self.ids)
        forced = (budget.close_ids[begun:] if begun else whole)[:room]
        self.forced_at = len(self.ids) - begun if forced else None
        self.ids.extend(forced)
        self._budget = None

        if len(self.ids) >= self._cap:
            self.finish_reason = "length"


def ends_with(ids: SequenceOf[int], wanted: SequenceOf[int], start: int = 0) -> bool:
    """Return whether the ids from ``start`` on end with ``wanted``."""
    first = len(ids) - len(wanted)
    return first >= start and list(ids[first:]) == list(wanted)


def count_begun(ids: SequenceOf[int], wanted: SequenceOf[int], start: int) -> int:
    """Return how many of the last ids from ``start`` on may be the beginning of ``wanted``."""
    count = len(wanted) - 1
    while not ends_with(ids, wanted[:count], start):
        count -= 1
    return count


def choose(logits_V: Logits, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """Choose a token: the first largest logit at temperature 0, or a draw in float64.

    ``top_p`` is the smallest mass to draw from, in (0, 1]; at temperature 0, ``random`` is not
    used.
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

    scaled_V = (logits_V.astype(np.float64) - float(logits_V[best])) / temperature
    weight_V = np.exp(scaled_V)
    draw = random.random()

    if top_p == 1.0:
        return _draw(np.arange(weight_V.size), weight_V, draw)

    # Sort a few likely tokens instead of all: the same result, unless they lack the mass.
    wanted = top_p * weight_V.sum()
    likely = np.flatnonzero(weight_V > _UNLIKELY)
    if weight_V[likely].sum() < wanted:
        likely = np.arange(weight_V.size)

    order = likely[np.argsort(-weight_V[likely], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weight_V[order]), wanted)) + 1
    nucleus = order[:count]
    return _draw(nucleus, weight_V[nucleus], draw)


def _draw(ids: NDArray[np.int64], weights: NDArray[np.float64], draw: float) -> int:
    """Return the id at ``draw`` in [0, 1) of the cumulative weight."""
    cumulative = np.cumsum(weights)
    place = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(ids[min(place, ids.size - 1)])


def check_request(
    prompts: SequenceOf[SequenceOf[int]], sampling: Sampling, context_tokens: int, vocabulary: int
) -> None:
    """Refuse what no engine could carry out; nothing is ever clipped."""
    for index, ids in enumerate(prompts):
        check_ids(ids, f"prompt {index}", context_tokens - 1, vocabulary)
    if problem := _find_problem(sampling, vocabulary):
        raise EngineError(
            "bad-generation-setting",
            f"cannot generate: {problem}",
            remedy="correct the generation settings",
        )


def check_ids(ids: SequenceOf[int], what: str, limit: int, vocabulary: int) -> None:
    """Refuse token ids that are none, too many, or outside the vocabulary."""
    if not ids:
        raise PromptError(
            "empty-prompt", f"{what} has no tokens", remedy="render the chat template first"
        )

    if len(ids) > limit:
        raise ContextError(
            "prompt-too-long",
            f"{what} has {len(ids)} tokens, the context takes at most {limit}",
            remedy="shorten the text, or raise context_tokens as far as the model is made for, as "
            "in racdeploy.load(BUNDLE, context_tokens=8192); racdeploy never clips a text",
        )

    if min(ids) < 0 or max(ids) >= vocabulary:
        strange = next(token for token in ids if not 0 <= token < vocabulary)
        raise PromptError(
            "unknown-token-id",
            f"{what} holds token id {strange}, the model has ids 0 to {vocabulary - 1}",
            remedy="use the tokenizer that belongs to this model",
        )


def _find_problem(sampling: Sampling, vocabulary: int) -> str:
    if sampling.max_new_tokens < 1:
        return f"max_new_tokens is {sampling.max_new_tokens}, must be at least 1"
    if not 0.0 <= sampling.temperature < np.inf:
        return f"temperature is {sampling.temperature}, must be finite and not negative"
    if not 0.0 < sampling.top_p <= 1.0:
        return f"top_p is {sampling.top_p}, must be above 0 and at most 1"
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
    if not all(np.isfinite([budget.close_bias, budget.hesitation_penalty])):
        return False

    tags = budget.close_ids + budget.open_ids
    named = tags + budget.closing_ids + budget.hesitation_ids
    return all(0 <= token < vocabulary for token in named)

"""Engine for a Hugging Face folder, in float32.

Prompts are left-padded and decoded in batches of ``parallel``; sequences that have ended leave the
batch. Recurrent states cannot be padded: models with states decode one sequence at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from racdeploy.engines.backends.transformers.torch_model import (
    GgmlRounding,
    load_model,
    make_cache,
    round_as_ggml,
)
from racdeploy.engines.engine import (
    Completion,
    Engine,
    EngineSettings,
    IsCancelled,
    Logits,
    OnTokens,
    Sampling,
)
from racdeploy.engines.sequence import GeneratedSequence, check_ids, check_request
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.processes.heap import keep_heap

_MAX_FORWARD_TOKENS = 16_384
"""Of all sequences in one forward pass: the activations of more would fill the memory."""


class TransformersEngine(Engine):
    """A checkpoint in float32; ``cache_dtype`` and ``flash_attention`` do not apply."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        keep_heap()
        if settings.threads:
            torch.set_num_threads(settings.threads)

        self.stats = {}
        self.info = {}
        self._settings = settings
        self._checkpoint = Checkpoint(folder)
        self._vocabulary = self._checkpoint.shape.vocab_size
        self._model = load_model(self._checkpoint)
        parameters = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # until 5.20
        self._has_state = self._checkpoint.family.has_state
        self._needs_cache_position = self._has_state and "cache_position" in parameters

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: IsCancelled | None = None,
    ) -> list[Completion]:
        context_tokens = self._settings.context_tokens
        check_request(prompts, sampling, context_tokens, self._vocabulary)
        sequences = [
            GeneratedSequence(i, ids, sampling, context_tokens) for i, ids in enumerate(prompts)
        ]

        for sequence in sequences:
            if on_tokens and (sequence.initial_forced_ids or sequence.finish_reason):
                on_tokens(sequence.index, sequence.initial_forced_ids, sequence.final_completion)

        parallel = 1 if self._has_state else self._settings.parallel
        for start in range(0, len(sequences), parallel):
            group = sequences[start : start + parallel]
            running = [s for s in group if s.finish_reason is None]
            self._run(running, on_tokens, cancelled)

        return [sequence.completion() for sequence in sequences]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], *, rounding: GgmlRounding | None = None) -> Logits:
        """Return logits_TV of a teacher-forced pass, with ggml's roundings if they are given."""
        check_ids(ids, "the sequence", self._settings.context_tokens, self._vocabulary)
        imitation: AbstractContextManager[None] = nullcontext()
        if rounding is not None:
            imitation = round_as_ggml(self._model, self._checkpoint.shape, rounding)

        with imitation:
            output = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False)

        logits_TV: Logits = output.logits[0].float().numpy()
        return logits_TV

    def close(self) -> None:
        self._model = torch.nn.Module()

    def _run(
        self,
        sequences: list[GeneratedSequence],
        on_tokens: OnTokens | None,
        cancelled: IsCancelled | None,
    ) -> None:
        """Decode one batch to its end; a step feeds the same number of tokens to each sequence."""
        cache = make_cache(self._model, self._checkpoint)
        mask_BX = torch.zeros((len(sequences), 0), dtype=torch.long)  # X: all tokens so far

        while sequences:
            if cancelled and cancelled():
                for sequence in sequences:
                    sequence.cancel()
                return

            # A forced close tag makes one sequence longer than the rest, hence padding in between.
            tensors = [torch.tensor(sequence.pending_ids) for sequence in sequences]
            pad = partial(pad_sequence, batch_first=True, padding_side="left")
            ids_BT, mask_BT = pad(tensors), pad([torch.ones_like(ids_T) for ids_T in tensors])

            mask_BX = torch.cat([mask_BX, mask_BT], dim=1)
            position_BX = (mask_BX.cumsum(1) - 1).clamp(min=0)
            logits_BV, cache = self._feed(ids_BT, mask_BX, position_BX, cache)

            for sequence, logits_V in zip(sequences, logits_BV, strict=True):
                sequence.pending_ids = []
                new_ids = sequence.step(logits_V)
                if on_tokens:
                    on_tokens(sequence.index, new_ids, sequence.final_completion)

            running = [row for row, s in enumerate(sequences) if s.finish_reason is None]
            if running and len(running) < len(sequences):
                rows = torch.tensor(running, dtype=torch.long)
                cache.batch_select_indices(rows)
                mask_BX = mask_BX[rows]
            sequences = [sequences[row] for row in running]

    def _feed(
        self,
        ids_BT: torch.Tensor,
        mask_BX: torch.Tensor,
        position_BX: torch.Tensor,
        cache: Any,
    ) -> tuple[Logits, Any]:
        """Feed T new tokens of each sequence in chunks.

        Returns:
            logits_BV of the last token, and the cache.
        """
        rows, width = ids_BT.shape
        chunk = max(1, _MAX_FORWARD_TOKENS // rows)
        end = mask_BX.shape[1] - width
        if self._has_state:  # transformers 4 updates a state by a whole prompt, or by one token
            chunk = 1 if end else width

        for ids_BP in torch.split(ids_BT, chunk, dim=1):
            start, end = end, end + ids_BP.shape[1]
            # Without it, Granite 4 in transformers 4 reads an empty cache as one token.
            extra = (
                {"cache_position": torch.arange(start, end)} if self._needs_cache_position else {}
            )
            output = self._model(
                input_ids=ids_BP,
                attention_mask=mask_BX[:, :end],
                position_ids=position_BX[:, start:end],
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_name: cache},
                **extra,
            )

            cache = output[self._cache_name]

        logits_BV: Logits = output.logits[:, -1].numpy()
        return logits_BV, cache


def chat_prompt_ids(folder: Path, questions: Sequence[str]) -> list[list[int]]:
    """Return prompt ids of user questions by transformers' ``apply_chat_template``."""
    # A model that names another tokenizer class makes transformers warn: it is not used here.
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    finally:
        transformers_logging.set_verbosity(before)

    prompts = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompts.append(list(ids))

    return prompts

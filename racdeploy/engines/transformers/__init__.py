"""PyTorch through transformers: the reference that exports are compared with, and the source of
traces.

``path`` is a Hugging Face folder. Prompts are left-padded and decoded in batches of ``parallel``;
sequences that have ended leave the batch. Weights and arithmetic are float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from racdeploy.decoding.engine import Completion, Engine, EngineSettings, Sampling
from racdeploy.decoding.sequence import Sequence, check_ids, check_request
from racdeploy.engines.transformers.torch_model import load_model, looked_up
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.storage.heap import keep_heap

__all__ = ["ACCEL", "TransformersEngine", "chat_ids", "open_engine"]

ACCEL = False


class TransformersEngine(Engine):
    """A checkpoint in float32 under transformers.

    Args:
        folder: Hugging Face folder.
        settings: ``cache_dtype`` and ``flash_attention`` do not apply: the cache is float32.
    """

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        keep_heap()
        self.stats, self.about = {}, {}
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        self._checkpoint = Checkpoint(folder)
        self._vocabulary = self._checkpoint.integer("vocab_size")
        self._model = load_model(self._checkpoint)

    @torch.inference_mode()
    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        sampling: Sampling,
        on_tokens: Callable[[int, SequenceOf[int]], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; see :class:`racdeploy.decoding.engine.Engine`."""
        context = self._settings.context_tokens
        check_request(prompts, sampling, context, self._vocabulary)
        sequences = [Sequence(i, ids, sampling, context) for i, ids in enumerate(prompts)]
        if on_tokens:
            for sequence in sequences:
                if sequence.ids:
                    on_tokens(sequence.index, sequence.ids)
        for start in range(0, len(sequences), self._settings.parallel):
            group = sequences[start : start + self._settings.parallel]
            self._run([s for s in group if s.finish_reason is None], on_tokens, cancelled)
        return [sequence.completion() for sequence in sequences]

    @torch.inference_mode()
    def logits(self, ids: SequenceOf[int], *, as_ggml: bool = False) -> NDArray[np.float32]:
        """Return logits_TV of a teacher-forced pass; ``as_ggml`` with the rounding of ggml's
        look-up tables.
        """
        check_ids(ids, "the sequence", self._settings.context_tokens, self._vocabulary)
        with looked_up(self._model, self._checkpoint) if as_ggml else nullcontext():
            output = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        result: NDArray[np.float32] = output.logits[0].float().numpy()
        return result

    def close(self) -> None:
        """Free the weights."""
        self._model = torch.nn.Module()

    def _run(
        self,
        sequences: list[Sequence],
        on_tokens: Callable[[int, SequenceOf[int]], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        """Decode one batch to its end; all sequences are fed the same number of tokens each
        step.
        """
        cache, mask_BT = DynamicCache(), None
        while sequences:
            if cancelled and cancelled():
                for sequence in sequences:
                    sequence.cancel()
                return
            # A forced close tag makes one sequence longer than the rest; the others are left-padded
            # in between.
            ids_BT, new_BT = _left_pad([s.unfed for s in sequences])
            mask_BT = new_BT if mask_BT is None else torch.cat([mask_BT, new_BT], dim=1)
            position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            output = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            for sequence, logits_V in zip(sequences, output.logits[:, -1].numpy(), strict=True):
                sequence.unfed = []
                news = sequence.step(logits_V)
                if on_tokens:
                    on_tokens(sequence.index, news)
            running = [row for row, s in enumerate(sequences) if s.finish_reason is None]
            if len(running) < len(sequences):
                rows = torch.tensor(running, dtype=torch.long)
                cache.batch_select_indices(rows)
                mask_BT = mask_BT[rows]
                sequences = [sequences[row] for row in running]


def chat_ids(folder: Path, questions: SequenceOf[str]) -> list[list[int]]:
    """Return the prompt ids that transformers' own ``apply_chat_template`` gives for questions of a
    user.
    """
    with _errors_only():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    conversations = [[{"role": "user", "content": question}] for question in questions]
    return [
        list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for messages in conversations
    ]


def open_engine(path: Path, settings: EngineSettings) -> TransformersEngine:
    """Load a Hugging Face folder."""
    return TransformersEngine(path, settings)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep transformers from warning that the model names a class of its own, whose rules may not
    be the file's.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _left_pad(rows: SequenceOf[SequenceOf[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids_BT and a mask_BT that is 1 on real tokens."""
    T = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (T - len(row)) + list(row) for row in rows])
    mask_BT = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    return ids_BT, mask_BT

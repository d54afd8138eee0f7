"""An engine that says what its file scripts, token by token: long thoughts, answers, loops.

Budgets, caps and stops are those of every engine; only the logits are made up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from racdeploy.engines.engine import (
    Completion,
    Engine,
    EngineSettings,
    IsCancelled,
    Logits,
    OnTokens,
    Sampling,
)
from racdeploy.engines.sequence import GeneratedSequence, check_request

ACCEL = False
generated = 0  # completions of this process


class Thinker(Engine):
    """The model of a file with ``vocabulary``, ``thought`` (ids) and ``answers`` (ids by prompt).

    Without answers the thought repeats for ever.
    """

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        self._script = json.loads(path.read_text())
        self._settings = settings
        self.stats = {}
        self.info = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: IsCancelled | None = None,
    ) -> list[Completion]:
        global generated
        check_request(prompts, sampling, self._settings.context_tokens, self._script["vocabulary"])
        completions = []
        for index, prompt in enumerate(prompts):
            sequence = GeneratedSequence(index, prompt, sampling, self._settings.context_tokens)
            thought, answers = self._script["thought"], self._script["answers"]
            script = thought + answers[str(list(prompt))] if answers else thought
            while not (completion := sequence.final_completion):
                logits_V = np.zeros(self._script["vocabulary"], np.float32)
                logits_V[script[len(sequence.ids) % len(script)]] = 1
                new_ids = sequence.step(logits_V)
                if on_tokens:
                    on_tokens(index, new_ids, sequence.final_completion)
            completions.append(completion)
            generated += 1
        return completions

    def logits(self, ids: Sequence[int]) -> Logits:
        raise NotImplementedError


def open_engine(path: Path | str, settings: EngineSettings) -> Engine:
    return Thinker(Path(path), settings)

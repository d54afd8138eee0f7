"""The divergence stage: how far a file is from the dense model, measured once on its engine.

Known tokens are read, which is several times as fast as answering. They are the dense model's
held-out traces, and texts of several kinds, each as the beginning of one. Those that choose a model
are not those that report on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from pydantic import TypeAdapter

from racdeploy.engines.engine import Engine
from racdeploy.exporting import ExportResult
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.dense_logits import make_opener
from racdeploy.pipeline.workspace import identify_code
from racdeploy.traces.text import split_text
from racdeploy.traces.trace import Trace, TraceSet
from racdeploy.verification.answer_sampler import TraceIds
from racdeploy.verification.stats.distributions import Floats
from racdeploy.verification.top_logits import (
    LogitDifferences,
    TopLogits,
    compare_top_logits,
    completion_logits,
    log_probabilities,
    take_top,
)

TextUse = Literal["choose", "report"]
_MAX_TRACES = 32
_MAX_TRACE_TOKENS = 512  # of each trace: its first ones, so that a long thought costs no hour
_MAX_TEXT_TOKENS = 256  # of each text
_TEXTS: Mapping[TextUse, str] = {
    "choose": "text_to_choose.txt",
    "report": "text_to_report.txt",
}
"""Texts of the same kinds, with an empty line between them."""


@dataclass(frozen=True)
class Passages:
    """Distances of a file from the dense model on texts of one kind, one for each text.

    Args:
        tokens: tokens that were predicted.
        kl_sums: KL(dense ‖ file) in nats, summed over the text.
        same: tokens that both predict first.
    """

    tokens: tuple[int, ...]
    kl_sums: tuple[float, ...]
    same: tuple[int, ...]

    @property
    def kl(self) -> float:
        """Mean KL of a token in nats."""
        return sum(self.kl_sums) / sum(self.tokens)

    @property
    def same_share(self) -> float:
        """Share of the tokens that both predict first."""
        return sum(self.same) / sum(self.tokens)


@dataclass(frozen=True)
class FileDivergence:
    """Distances of a file from the dense model.

    Args:
        answer_tokens: mean tokens of a whole answer of the dense model.
        knows_text: the dense model predicts the texts better than by chance. If not, a distance
            on them says nothing.
    """

    traces: Passages
    text: Passages
    answer_tokens: float
    knows_text: bool = True


@dataclass(frozen=True)
class DivergenceMeter:
    """Measures files against the dense model of a build, which is read once under torch.

    Its traces and its tokenizer are used.
    """

    build: Build

    def measure(self, exported: ExportResult, use: TextUse = "choose") -> FileDivergence:
        """Return the divergence of a file with the dense model's tokens, measured or known.

        Args:
            exported: the file.
            use: whether a model is chosen by the figures, or reported on. The report has no traces:
                it is on other prompts, which the verification asks.
        """
        trace_folder, _ = self.build.traces()
        inputs = identify_code(__name__) | {
            "dense": self.build.job.checkpoint.sha256,
            "files": dict(exported.files),
            "traces": TraceSet(trace_folder).sha256 if use == "choose" else "",
            "texts": use,
        }

        stage = self.build.workspace.open("divergence", inputs)
        if not stage.is_finished:
            stage.finish(asdict(self._compare(exported, use)))
        return TypeAdapter(FileDivergence).validate_python(stage.summary)

    @cached_property
    def _traces(self) -> Sequence[Trace]:
        """Traces that nothing is fitted to: held-out ones, and those over the token budget."""
        _, traces = self.build.traces()
        chosen = self.build.prune_stage.choose_traces(traces)
        unseen = [*chosen.held_out, *chosen.unused]
        return (unseen or traces)[:_MAX_TRACES]

    @cached_property
    def _trace_ids(self) -> list[TraceIds]:
        return [(each.prompt_ids, each.completion_ids[:_MAX_TRACE_TOKENS]) for each in self._traces]

    @cached_property
    def _text_ids(self) -> dict[TextUse, list[TraceIds]]:
        job = self.build.job
        leading_ids = job.encoder.leading_ids
        positions = job.checkpoint.shape.max_positions
        most = min(_MAX_TEXT_TOKENS, positions - len(leading_ids))

        passages: dict[TextUse, list[TraceIds]] = {}
        for use in _TEXTS:
            passages[use] = []
            for text in _read_texts(use):
                ids = job.encoder.encode_text(text)
                passages[use] += split_text(ids[:most], most, leading_ids)
        return passages

    @cached_property
    def _dense(self) -> _DenseModel:
        """What the dense model predicts of everything that files are compared on."""
        job = self.build.job
        texts = self._text_ids
        with self._open("transformers", job.checkpoint.folder) as engine:
            traces = self._read(engine, self._trace_ids)
            nats: list[Floats] = []
            chosen = self._read(engine, texts["choose"], nats)
            reported = self._read(engine, texts["report"])

        chance_nats = math.log(job.checkpoint.shape.vocab_size)
        knows_text = np.concatenate(nats).mean() < chance_nats
        return _DenseModel(traces, {"choose": chosen, "report": reported}, bool(knows_text))

    def _read(
        self, engine: Engine, passages: Sequence[TraceIds], nats: list[Floats] | None = None
    ) -> list[TopLogits]:
        """Return the most likely tokens of each passage; append what its own cost to ``nats``."""
        tops = []
        for number, passage in enumerate(passages):
            self.build.workspace.report("read dense", number, len(passages))
            logits_TV = completion_logits(engine, passage)
            tops.append(take_top(logits_TV))
            if nats is not None:
                _, completion = passage
                nats.append(-log_probabilities(logits_TV, np.array(completion)[:, None]))
        return tops

    def _compare(self, exported: ExportResult, use: TextUse) -> FileDivergence:
        dense = self._dense
        traces: list[LogitDifferences] = []
        answer_tokens = 0.0
        with self._open(self.build.job.backend, exported.path) as engine:
            if use == "choose":
                answer_tokens = fmean(len(trace.completion_ids) for trace in self._traces)
                traces = self._measure(engine, self._trace_ids, dense.traces)
            text = self._measure(engine, self._text_ids[use], dense.texts[use])

        return FileDivergence(
            traces=_sum_up(traces),
            text=_sum_up(text),
            answer_tokens=answer_tokens,
            knows_text=dense.knows_text,
        )

    def _measure(
        self, engine: Engine, passages: Sequence[TraceIds], dense: Sequence[TopLogits]
    ) -> list[LogitDifferences]:
        return compare_top_logits(engine, passages, dense, self.build.progress)

    def _open(self, backend: str, path: Path) -> AbstractContextManager[Engine]:
        texts = self._text_ids
        passages = [*self._trace_ids, *texts["choose"], *texts["report"]]
        context_tokens = 1 + max(len(prompt) + len(rest) for prompt, rest in passages)
        return make_opener(backend, path, context_tokens, self.build.threads)()


@dataclass(frozen=True)
class _DenseModel:
    """The most likely tokens of the dense model in every passage, under torch."""

    traces: list[TopLogits]
    texts: Mapping[TextUse, list[TopLogits]]
    knows_text: bool


def _sum_up(compared: Sequence[LogitDifferences]) -> Passages:
    tokens = []
    kl_sums = []
    same = []
    for each in compared:
        tokens.append(len(each.kl_T))
        kl_sums.append(float(each.kl_T.sum()))
        same.append(int(each.same_T.sum()))
    return Passages(tuple(tokens), tuple(kl_sums), tuple(same))


def _read_texts(use: TextUse) -> list[str]:
    file = files("racdeploy.pipeline") / _TEXTS[use]
    texts = file.read_text(encoding="utf-8").split("\n\n")
    return [text.strip() for text in texts]

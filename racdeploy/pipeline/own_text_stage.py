"""The own-text stage: the dense model writes text without a prompt, to be calibrated on too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Ids
from racdeploy.files.stages import Inputs
from racdeploy.models.tokenizer_files import find_token_ids
from racdeploy.pipeline.trace_stage import TraceStage, remove_finished_logs
from racdeploy.pipeline.workspace import identify_code
from racdeploy.traces.own_text import (
    TOKENS,
    count_shards,
    count_texts_together,
    take_tokens,
    write_own_text,
)
from racdeploy.traces.trace import Trace, TraceSet

_STAGE = "own-text"


@dataclass(frozen=True)
class OwnTextStage:
    """The stage in which the model of the traces writes freely.

    Args:
        trace_stage: its engine writes; a server answers prompts alone, so the model is loaded here.
        tokens: of all texts together; 0 writes none.
    """

    trace_stage: TraceStage
    tokens: int

    @property
    def inputs(self) -> Inputs:
        """Everything that the text depends on; empty without text."""
        if not self.tokens:
            return {}
        stage = self._local_stage
        return identify_code(__name__) | {
            "engine": dict(stage.identify_engine(stage.dense)),
            "first": list(self.first_ids),
            "tokens": self.tokens,
            "seed": stage.settings.seed,
        }

    @property
    def first_ids(self) -> Ids:
        """Ids that begin every text of the model, or else a token that stands between texts."""
        dense, encoder = self.trace_stage.dense, self.trace_stage.encoder
        between = [*find_token_ids(dense.config, "bos"), *dense.eos_ids]
        return tuple(encoder.leading_ids) or (between[0],)

    def run(self) -> list[Trace]:
        """Return the text, as traces of whole texts; written earlier, or now."""
        if not self.tokens:
            return []
        trace_stage = self._local_stage
        workspace, dense = trace_stage.workspace, trace_stage.dense
        trace_stage.export_file(dense)  # whether it can answer is an input
        stage = workspace.open(_STAGE, self.inputs)
        out = TraceSet(stage.folder)
        if stage.is_finished:
            return take_tokens(out.read(), self.tokens)

        total = count_texts_together(self.tokens) * count_shards(self.tokens)
        progress = CompletionProgress(workspace.progress, "own text", total)
        with trace_stage.open_source(
            stage.folder,
            progress,
            dense,
            prompt_tokens=len(self.first_ids),
            answer_tokens=TOKENS,
        ) as source:
            texts = write_own_text(
                source,
                out,
                self.first_ids,
                stop_ids=dense.eos_ids,
                tokens=self.tokens,
                seed=trace_stage.settings.seed,
                completion_progress=progress,
            )
        remove_finished_logs(stage.folder)
        stage.finish({"texts": len(texts)})
        return texts

    @property
    def _local_stage(self) -> TraceStage:
        settings = self.trace_stage.settings.model_copy(update={"server": ""})
        return replace(self.trace_stage, settings=settings)

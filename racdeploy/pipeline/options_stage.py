"""The options stage: what every way to store a linear changes, found once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workplace import COMPUTING, Workplace, address
from racdeploy.prune.surveyed import Option, Surveyed
from racdeploy.recipe import Calibration, Pruning
from racdeploy.storage.files import canonical_hash
from racdeploy.traces.trace import Trace

MOST_TOKENS = 8192
"""Of the traces that are looked at: more find the same order of options."""
_PLAIN = {
    "sparsity": 0.0,
    "pattern": "unstructured",
    "allocation": "uniform",
    "shares": {},
    "schedule": (),
    "joint": False,
}
"""What options say themselves."""


@dataclass(frozen=True)
class OptionsStage:
    """Ways to store the linears of a dense model, and the widths of its parts, on trial.

    Args:
        settings: how zeros are chosen where an option has some; how many is the option's to say.
        options: keys of :class:`racdeploy.prune.surveyed.Option`.
        parts: structures whose widths are tried, too.
        most_tokens: of the traces that are looked at; 0: every trace.
    """

    place: Workplace
    dense: Checkpoint
    calibration: Calibration
    settings: Pruning
    options: tuple[str, ...]
    parts: tuple[str, ...] = ("ffn",)
    most_tokens: int = MOST_TOKENS

    def run(self, traces: Sequence[Trace]) -> Surveyed:
        """Try the options on calibration traces of the dense model, or find them tried."""
        from racdeploy.prune.device import choose_device

        device = choose_device(self.settings.device).type
        settings = self.settings.model_copy(update={**_PLAIN, "device": device})
        options = sorted({Option.parse(key).key for key in self.options})
        inputs = address(__name__, COMPUTING) | {
            "model": self.dense.sha256,
            "traces": canonical_hash([trace.ids for trace in traces]),
            "weights": self.calibration.weights.model_dump(),
            "prune": settings.model_dump(),
            "options": options,
            "parts": sorted(self.parts),
            "most_tokens": self.most_tokens,
        }

        stage = self.place.open("options", inputs)
        if not stage.finished:
            from racdeploy.prune.options import survey_options

            self.place.report("options", 0, self.dense.block_count)
            found = survey_options(
                self.dense,
                traces,
                settings,
                options,
                stage.folder,
                most_tokens=self.most_tokens,
                parts=self.parts,
                weights=self.calibration.weights,
                threads=self.place.threads,
                progress=self.place.progress,
            )
            stage.finish(found.as_json())

        return Surveyed.read(stage.summary)

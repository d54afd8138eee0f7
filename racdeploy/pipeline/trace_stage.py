"""The trace stage: a model answers the calibration prompts, here or on a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.engines.counter import Counter
from racdeploy.engines.engine import Completion, Engine, EngineSettings
from racdeploy.engines.token_log import TokenLog
from racdeploy.errors import ArtifactError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workplace import COMPUTING, Workplace, address, print_notice
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags
from racdeploy.tasks import TaskSet
from racdeploy.traces import server
from racdeploy.traces.collect import Answering, Asked, collect, trace_counts
from racdeploy.traces.trace import Trace, TraceSet

_GROWING = "growing-"


@dataclass(frozen=True)
class TraceStage:
    """Traces of the dense model, or of a sparse one on its way."""

    place: Workplace
    dense: Checkpoint
    encoder: PromptEncoder
    tags: ThinkingTags | None
    tasks: TaskSet
    settings: Traces

    def inputs(self, checkpoint: Checkpoint, first: int = 0) -> dict[str, Any]:
        """Return what decides the traces of a model; a server's do not depend on torch here."""
        return address(__name__, () if self._is_served(checkpoint) else COMPUTING) | {
            "model": checkpoint.sha256,
            "tasks": self.tasks.identify_calibration(),
            "traces": self.settings.identity,
            **({"first": first} if first else {}),
        }

    def run(self, sparse: Path | None = None, first: int = 0) -> tuple[Path, list[Trace]]:
        """Return the stage folder and the traces of the dense model, or of a sparse one's.

        Args:
            sparse: its folder.
            first: how many of the prompts are answered; 0 is all.
        """
        checkpoint = Checkpoint(sparse) if sparse else self.dense
        stage = self.place.open("traces", self.inputs(checkpoint, first))
        out = TraceSet(stage.folder)

        if stage.finished:
            if out.sha256 != stage.summary["traces_sha256"]:
                raise ArtifactError(
                    "traces-changed",
                    f"the traces in {stage.folder} are not the ones that were collected",
                    remedy=f"remove {stage.folder} and run the command again",
                )

            return stage.folder, out.read()

        settings = self.settings
        problems = self.tasks.draw("calibration", settings.seed, settings.count)[: first or None]
        longest = max(len(self.encoder.encode(problem.question)) for problem in problems)
        context_tokens = longest + settings.max_new_tokens + 1

        # The bar is there while the model is loaded.
        eos_ids = self.dense.eos_ids
        counter = Counter(self.place.progress, "traces", len(problems))
        counter.keep(out.count())

        with self._answering(context_tokens, stage.folder, checkpoint, counter) as answering:
            traces = collect(
                answering, self.encoder, self.tags, eos_ids, problems, settings, out, counter
            )

        _forget_growing(stage.folder)
        counts = trace_counts(traces, checkpoint, self.encoder, settings.identity)
        stage.finish(counts | {"traces_sha256": out.sha256})
        return stage.folder, traces

    def describe_code(self) -> dict[str, str]:
        """Return what all processes that answer together must have in common."""
        return address(__name__, COMPUTING) | {"model": self.dense.sha256}

    def share(self, given: Mapping[str, Any]) -> None:
        """Answer this process's share; where any lacks the model, the first one answers all."""
        sha256 = given["sha256"]
        is_dense = sha256 == self.dense.sha256
        folder = self.dense.folder if is_dense else given["folder"]

        processes = self.place.processes
        has_it = (folder / "config.json").is_file() and Checkpoint(folder).sha256 == sha256

        if all(processes.all(has_it)):
            with _open(folder, given["settings"]) as engine:
                processes.serve(lambda asked: engine.generate(*asked))

    @contextmanager
    def _answering(
        self, context_tokens: int, folder: Path, checkpoint: Checkpoint, counter: Counter
    ) -> Iterator[Answering]:
        """Yield what answers: a server that the recipe names, or the processes of this job."""
        if self._is_served(checkpoint):
            with server.answering(
                self.settings,
                checkpoint,
                self.encoder,
                context_tokens,
                folder,
                self.dense.folder,
                print_notice,
                counter,
            ) as answering:
                yield answering
            return

        if self.settings.server_reload:
            cut = _find_cut(self.dense, checkpoint)
            print_notice(
                f"{checkpoint.folder.name} is asked here and not on the server, which keeps the "
                f"shapes it was started with: {cut}"
            )

        processes = self.place.processes
        settings = EngineSettings(context_tokens, self.settings.batch, self.place.threads)
        model = checkpoint.folder.resolve()
        given = {"settings": settings, "folder": model, "sha256": checkpoint.sha256}

        with _open(model, settings) as engine:
            answer = partial(_answer_durably, engine, folder, counter)

            # A process that cannot read a sparse model, which the first wrote, leaves all to it.
            with processes.job("traces", self.describe_code(), given):
                together = all(processes.all(True))
                if together:
                    yield Answering(partial(processes.each, answer), processes.count)
                    processes.tell(())

            if not together:
                yield Answering(lambda asked: [answer(each) for each in asked])

    def _is_served(self, checkpoint: Checkpoint) -> bool:
        if checkpoint.sha256 == self.dense.sha256:
            return bool(self.settings.server)
        return bool(self.settings.server_reload) and not _find_cut(self.dense, checkpoint)


def _find_cut(dense: Checkpoint, sparse: Checkpoint) -> str:
    """Return a tensor of another shape than the dense model's, or an empty string."""
    for name in sorted({*dense.entries, *sparse.entries}):
        before, after = _write_shape(dense, name), _write_shape(sparse, name)
        if before != after:
            return f"{name} is {after}, in the dense model {before}"

    return ""


def _write_shape(model: Checkpoint, name: str) -> str:
    entry = model.entries.get(name)
    return " × ".join(map(str, entry.shape)) if entry else "missing"


def _open(folder: Path, settings: EngineSettings) -> Engine:
    engine: Engine = plugins.load("engines", "transformers").open_engine(folder, settings)
    return engine


def _answer_durably(
    engine: Engine, folder: Path, counter: Counter, asked: Asked
) -> list[Completion]:
    """Answer a shard; every token is on disk within a second, and a run that was killed goes on."""
    prompts, sampling = asked
    file = folder / f"{_GROWING}{sampling.seed}.jsonl"  # each shard has a seed of its own
    _forget_growing(folder, file)

    with TokenLog(file, len(prompts)) as log:

        def on_tokens(index: int, ids: Sequence[int], ended: Completion | None) -> None:
            log.append(index, ids)
            counter.on_tokens(index, ids, ended)

        return engine.generate(prompts, replace(sampling, begun=log.begun), on_tokens)


def _forget_growing(folder: Path, kept: Path | None = None) -> None:
    """Remove the tokens of shards that are finished."""
    for file in folder.glob(f"{_GROWING}*"):
        if file != kept:
            file.unlink()

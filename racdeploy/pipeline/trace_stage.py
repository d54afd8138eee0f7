"""The trace stage: a model answers the calibration prompts, here or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from racdeploy import plugins
from racdeploy.engines.completion_log import TokenLog
from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion, Engine, EngineSettings
from racdeploy.errors import ArtifactError
from racdeploy.files.reading import read_json
from racdeploy.files.stages import Inputs, Stage
from racdeploy.files.writing import write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workspace import COMPUTE_LIBRARIES, Workspace, identify_code
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags
from racdeploy.tasks import TaskSet
from racdeploy.traces import server
from racdeploy.traces.collect import (
    CompletionSource,
    ShardRequest,
    collect_traces,
    summarize_traces,
)
from racdeploy.traces.trace import Trace, TraceSet

_UNFINISHED = "growing-"  # prefix of token logs of shards that are being answered
_TOGETHER = "together.json"  # number of sequences that a file's engine decodes together


_OpenEngine = Callable[[Path, EngineSettings], Engine]


def _open(model: Path, settings: EngineSettings) -> Engine:
    engine: Engine = plugins.load("engines", "transformers").open_engine(model, settings)
    return engine


class FileEngine(Protocol):
    """An engine that answers faster than transformers, from a file that is exported of a model.

    Only what is passed here knows that engine: the code of the stage does not depend on it.
    """

    @property
    def open(self) -> _OpenEngine:
        """Opens a file, see :func:`racdeploy.engines.open_engine`; other processes call it, too."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Number format, engine and its code: inputs of the traces."""

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Return False for a model whose file was found to differ from it."""

    def export(self, checkpoint: Checkpoint) -> Path | None:
        """Return the file of a model, or None if it differs from the model."""


class FitSequences(Protocol):
    """Function that finds how many sequences memory has room for.

    It takes the model, the tokens of the longest prompt and of the longest sequence, and whether a
    file answers.
    """

    def __call__(
        self, checkpoint: Checkpoint, prompt_tokens: int, context_tokens: int, from_file: bool
    ) -> int: ...


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """Request to answer prompts, as it is sent to the other processes of a job.

    Args:
        open: opens the model's engine.
        model: folder or file that the engine opens.
        sha256: hash of the model's checkpoint.
    """

    settings: EngineSettings
    open: _OpenEngine
    model: Path
    sha256: str


@dataclass(frozen=True)
class TraceStage:
    """The stage that collects traces of the dense model, or of a sparse one in recovery.

    ``file_engine`` answers where it can; None for checkpoints under transformers. Without
    ``fit_sequences`` a whole shard is decoded together.
    """

    workspace: Workspace
    dense: Checkpoint
    encoder: PromptEncoder
    tags: ThinkingTags | None
    tasks: TaskSet
    settings: Traces
    file_engine: FileEngine | None = None
    fit_sequences: FitSequences | None = None

    def inputs(self, checkpoint: Checkpoint, max_prompts: int = 0, samples: int = 1) -> Inputs:
        """Return the inputs of a model's traces; torch is one only if it generates them."""
        engine = self._find_engine(checkpoint)
        needs_torch = not (self._is_served(checkpoint) or engine)
        return identify_code(__name__, COMPUTE_LIBRARIES if needs_torch else ()) | {
            "model": checkpoint.sha256,
            "tasks": self.tasks.identify_calibration(),
            "traces": self.settings.identity,
            **({"first": max_prompts} if max_prompts else {}),
            **({"samples": samples} if samples > 1 else {}),
            **({"engine": dict(engine.identity)} if engine else {}),
        }

    def run(
        self, sparse: Path | None = None, max_prompts: int = 0, samples: int = 1
    ) -> tuple[Path, list[Trace]]:
        """Return the stage folder and the traces of a model.

        Args:
            sparse: folder of a sparse model; None for the dense one.
            max_prompts: number of prompts to answer, the first ones; 0 for all.
            samples: answers to each prompt, one after the other.
        """
        checkpoint = Checkpoint(sparse) if sparse else self.dense
        expected = self.inputs(checkpoint, max_prompts, samples)
        if not Stage.locate(self.workspace.work, "traces", expected).is_finished:
            self._export(checkpoint)  # whether the file can answer is an input

        stage = self.workspace.open("traces", self.inputs(checkpoint, max_prompts, samples))
        out = TraceSet(stage.folder)

        if stage.is_finished:
            if out.sha256 != stage.summary["traces_sha256"]:
                raise ArtifactError(
                    "traces-changed",
                    f"the traces in {stage.folder} are not the ones that were collected",
                    remedy=f"remove {stage.folder} and run the command again",
                )

            return stage.folder, out.read()

        settings = self.settings
        drawn = self.tasks.draw("calibration", settings.seed, settings.count)
        asked = drawn[:max_prompts] if max_prompts else drawn
        longest = max(len(self.encoder.encode(problem.question)) for problem in asked)
        problems = [problem for problem in asked for _ in range(samples)]

        # Progress is shown before the model is loaded, which takes a while.
        eos_ids = self.dense.eos_ids
        completion_progress = CompletionProgress(self.workspace.progress, "traces", len(problems))
        completion_progress.set_saved(out.count())

        with self._open_source(longest, stage.folder, checkpoint, completion_progress) as source:
            traces = collect_traces(
                source,
                self.encoder,
                self.tags,
                eos_ids,
                problems=problems,
                settings=settings,
                out=out,
                completion_progress=completion_progress,
            )

        _remove_finished_logs(stage.folder)
        counts = summarize_traces(traces, checkpoint, self.encoder, settings.identity)
        stage.finish(counts | {"traces_sha256": out.sha256})
        return stage.folder, traces

    def run_as_follower(self, request: TraceRequest) -> None:
        """Answer this process's share; if a process lacks the model, the first one answers all."""
        model = request.model
        is_dense = request.sha256 == self.dense.sha256
        if is_dense and request.open is _open:
            model = self.dense.folder

        has_model = model.is_file()
        if (model / "config.json").is_file():
            has_model = Checkpoint(model).sha256 == request.sha256

        share = self.workspace.share
        if not share.list_lacking(has_model):
            with request.open(model, request.settings) as engine:
                share.serve_calls(lambda request: engine.generate(*request))

    @contextmanager
    def _open_source(
        self,
        prompt_tokens: int,
        folder: Path,
        checkpoint: Checkpoint,
        completion_progress: CompletionProgress,
    ) -> Iterator[CompletionSource]:
        """Yield the source of completions: the recipe's server, or the processes of this job."""
        context_tokens = prompt_tokens + self.settings.max_new_tokens + 1
        if self._is_served(checkpoint):
            with server.open_server(
                self.settings,
                checkpoint,
                self.encoder,
                context_tokens=context_tokens,
                folder=folder,
                completion_progress=completion_progress,
            ) as source:
                yield source
            return

        file = self._export(checkpoint)
        request = self._make_request(
            file, checkpoint, folder, prompt_tokens=prompt_tokens, context_tokens=context_tokens
        )
        with request.open(request.model, request.settings) as engine:
            # The last bits of llama.cpp's logits depend on what is decoded together: a shard is
            # the same again only as a whole.
            resumes = file is None
            answer = partial(
                _answer_durably,
                engine=engine,
                folder=folder,
                completion_progress=completion_progress,
                resumes=resumes,
            )

            # Only the first process may see the sparse model that it wrote; then it answers all.
            share = self.workspace.share
            with self.workspace.announce(request, self):
                lacking = share.list_lacking(True)
                if not lacking:
                    with share.share_calls(answer) as answer_shards:
                        yield CompletionSource(answer_shards, share.count)

            if lacking:
                yield CompletionSource(lambda requests: [answer(each) for each in requests])

    def _make_request(
        self,
        file: Path | None,
        checkpoint: Checkpoint,
        folder: Path,
        *,
        prompt_tokens: int,
        context_tokens: int,
    ) -> TraceRequest:
        """Return what opens a model: its file, or its checkpoint under transformers."""
        open_model: _OpenEngine = _open
        model = checkpoint.folder
        if self.file_engine and file:
            open_model = self.file_engine.open
            model = file

        together = self._count_together(
            folder, checkpoint, prompt_tokens, context_tokens, from_file=file is not None
        )
        return TraceRequest(
            settings=EngineSettings(context_tokens, together, self.workspace.threads),
            open=open_model,
            model=model.resolve(),
            sha256=checkpoint.sha256,
        )

    def _find_engine(self, checkpoint: Checkpoint) -> FileEngine | None:
        """Return the engine that answers from a file; None for the server or transformers."""
        engine = self.file_engine
        if engine is None or self._is_served(checkpoint) or not engine.accepts(checkpoint):
            return None
        return engine

    def _export(self, checkpoint: Checkpoint) -> Path | None:
        """Return the file that answers for a model, None if none does."""
        engine = self._find_engine(checkpoint)
        return engine.export(checkpoint) if engine else None

    def _count_together(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        prompt_tokens: int,
        context_tokens: int,
        *,
        from_file: bool,
    ) -> int:
        """Return how many sequences are decoded together, in a resumed stage as many as before."""
        if self.fit_sequences is None:
            return self.settings.batch_size

        record = folder / _TOGETHER
        if not record.is_file():
            fitting = self.fit_sequences(checkpoint, prompt_tokens, context_tokens, from_file)
            write_atomic(record, f'{{"sequences": {fitting}}}\n')
        return int(read_json(record)["sequences"])

    def _is_served(self, checkpoint: Checkpoint) -> bool:
        """Return True if the recipe's server answers: it has the dense model."""
        return bool(self.settings.server) and checkpoint.sha256 == self.dense.sha256


def _answer_durably(
    request: ShardRequest,
    *,
    engine: Engine,
    folder: Path,
    completion_progress: CompletionProgress,
    resumes: bool,
) -> list[Completion]:
    """Answer a shard; tokens are on disk within a second, so a killed run may resume there."""
    prompts, sampling = request
    file = folder / f"{_UNFINISHED}{sampling.seed}.jsonl"  # each shard has a seed of its own
    _remove_finished_logs(folder, file if resumes else None)

    with TokenLog(file, len(prompts)) as log:

        def on_tokens(index: int, ids: Sequence[int], ended: Completion | None) -> None:
            log.append(index, ids)
            completion_progress.on_tokens(index, ids, ended)

        return engine.generate(prompts, replace(sampling, resume_from=log.resume_from), on_tokens)


def _remove_finished_logs(folder: Path, kept: Path | None = None) -> None:
    """Remove the token logs of finished shards: all but ``kept``."""
    for file in folder.glob(f"{_UNFINISHED}*"):
        if file != kept:
            file.unlink()

"""The trace stage: a model answers the calibration prompts, here or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from racdeploy.manifest import MAX_TOKENS
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workspace import COMPUTE_LIBRARIES, Workspace, identify_code
from racdeploy.recipe import Traces
from racdeploy.recipe.traces import FIRST_LIMIT, LEAST_TRACES
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags
from racdeploy.tasks import Problem, TaskSet
from racdeploy.traces import server
from racdeploy.traces.answer_limit import AnswerLimit, check_ends
from racdeploy.traces.collect import (
    LIMIT_FILE,
    CompletionSource,
    ShardRequest,
    TraceCollection,
    summarize_traces,
)
from racdeploy.traces.trace import Trace, TraceSet, count_tokens

_UNFINISHED = "growing-"  # prefix of token logs of shards that are being answered

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

    Args:
        file_engine: answers where it can; None for checkpoints under transformers.
        fit_sequences: None decodes a whole shard together.
        context_limit: tokens that model and target have room for. Where the recipe sets no limit,
            answers may be as long as they need.
        may_never_end: accept a dense model none of whose answers ends.
        enough_tokens: of the dense model's traces; further prompts are not asked. 0 asks all.
    """

    workspace: Workspace
    dense: Checkpoint
    encoder: PromptEncoder
    tags: ThinkingTags | None
    tasks: TaskSet
    settings: Traces
    file_engine: FileEngine | None = None
    fit_sequences: FitSequences | None = None
    context_limit: int = MAX_TOKENS
    may_never_end: bool = False
    enough_tokens: int = 0

    def inputs(
        self, checkpoint: Checkpoint, max_prompts: int = 0, samples: int = 1, limit: int = 0
    ) -> Inputs:
        """Return the inputs of a model's traces."""
        inputs: dict[str, object] = {
            **self.identify_engine(checkpoint),
            "tasks": self.tasks.identify_calibration(),
            "traces": self.settings.identity,
        }
        if max_prompts:
            inputs["first"] = max_prompts
        if samples > 1:
            inputs["samples"] = samples
        if limit:
            inputs["limit"] = limit
        if self._may_end_early(max_prompts, samples):
            inputs["enough"] = self.enough_tokens
        return inputs

    def identify_engine(self, checkpoint: Checkpoint) -> Inputs:
        """Return what answers for a model: torch is an input only if it does."""
        engine = self._find_engine(checkpoint)
        needs_torch = not (self._is_served(checkpoint) or engine)
        inputs: dict[str, object] = {
            **identify_code(__name__, COMPUTE_LIBRARIES if needs_torch else ()),
            "model": checkpoint.sha256,
        }
        if engine:
            inputs["engine"] = dict(engine.identity)
        return inputs

    def run(
        self, sparse: Path | None = None, max_prompts: int = 0, samples: int = 1, limit: int = 0
    ) -> tuple[Path, list[Trace]]:
        """Return the stage folder and the traces of a model.

        Args:
            sparse: folder of a sparse model; None for the dense one.
            max_prompts: number of prompts to answer, the first ones; 0 for all.
            samples: answers to each prompt, one after the other.
            limit: tokens of an answer, as the dense model has; 0 finds it, if the recipe sets none.
        """
        checkpoint = Checkpoint(sparse) if sparse else self.dense
        expected = self.inputs(checkpoint, max_prompts, samples, limit)
        if not Stage.locate(self.workspace.work, "traces", expected).is_finished:
            self.export_file(checkpoint)  # whether it can answer is an input

        stage = self.workspace.open("traces", self.inputs(checkpoint, max_prompts, samples, limit))
        out = TraceSet(stage.folder)

        if stage.is_finished:
            if out.sha256 != stage.summary["traces_sha256"]:
                raise ArtifactError(
                    "traces-changed",
                    f"the traces in {stage.folder} are not the ones that were collected",
                    remedy=f"remove {stage.folder} and run the command again",
                )

            return stage.folder, out.read()

        problems = self._list_problems(max_prompts, samples)
        longest = max(len(self.encoder.encode(problem.question)) for problem in problems)

        collection = self._make_collection(problems, out)
        if self._may_end_early(max_prompts, samples):
            collection = replace(collection, is_enough=self._is_enough)
        tokens = self.settings.max_new_tokens or limit
        if tokens:
            traces = self._collect(collection, checkpoint, longest, tokens)
        else:
            traces = self._probe_and_collect(collection, checkpoint, longest)

        remove_finished_logs(stage.folder)
        counts = summarize_traces(traces, checkpoint, self.encoder, self.settings.identity)
        stage.finish(counts | {"traces_sha256": out.sha256})
        return stage.folder, traces

    def _make_collection(self, problems: Sequence[Problem], out: TraceSet) -> TraceCollection:
        # Progress is shown before the model is loaded, which takes a while.
        completion_progress = CompletionProgress(self.workspace.progress, "traces", len(problems))
        completion_progress.set_saved(out.count())
        return TraceCollection(
            encoder=self.encoder,
            tags=self.tags,
            stop_ids=self.dense.eos_ids,
            problems=problems,
            settings=self.settings,
            out=out,
            completion_progress=completion_progress,
        )

    def _list_problems(self, max_prompts: int, samples: int) -> list[Problem]:
        """Return the first problems, each ``samples`` times."""
        drawn = self.tasks.draw("calibration", self.settings.seed, self.settings.count)
        asked = drawn[:max_prompts] if max_prompts else drawn
        return [problem for problem in asked for _ in range(samples)]

    def find_limit(self, samples: int = 1) -> AnswerLimit | None:
        """Return the limit that the dense model's traces have found; None before that."""
        inputs = self.inputs(self.dense, samples=samples)
        return read_limit(Stage.locate(self.workspace.work, "traces", inputs).folder)

    def _collect(
        self, collection: TraceCollection, checkpoint: Checkpoint, longest: int, tokens: int
    ) -> list[Trace]:
        """Answer prompts with at most ``tokens`` tokens; ``longest``: of the longest prompt."""
        with self._open_collection(collection, checkpoint, longest, tokens) as source:
            return collection.collect(source, tokens)

    def _probe_and_collect(
        self, collection: TraceCollection, checkpoint: Checkpoint, longest: int
    ) -> list[Trace]:
        """Answer the first prompts to find how long answers are, then the others.

        The engine is opened again for longer answers, with a context that holds them.

        Args:
            longest: tokens of the longest prompt.
        """
        most = max(self.context_limit - longest - 1, 1)
        tokens = min(FIRST_LIMIT, most)
        found = read_limit(collection.out.folder)
        while True:
            if found:
                tokens = found.tokens
            with self._open_collection(collection, checkpoint, longest, tokens) as source:
                found = found or collection.probe(source, tokens, most)
                if found and not self.may_never_end:
                    check_ends(found)
                if found and found.tokens <= tokens:
                    return collection.collect(source, found.tokens)
            tokens = min(2 * tokens, most)

    def _may_end_early(self, max_prompts: int, samples: int) -> bool:
        """Return whether the number of prompts depends on their tokens.

        Models that are compared prompt by prompt answer the same ones.
        """
        return bool(self.enough_tokens) and not max_prompts and samples == 1

    def _is_enough(self, traces: Sequence[Trace]) -> bool:
        if len(traces) < LEAST_TRACES:
            return False
        return count_tokens(traces) >= self.enough_tokens

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

    def _open_collection(
        self, collection: TraceCollection, checkpoint: Checkpoint, longest: int, tokens: int
    ) -> AbstractContextManager[CompletionSource]:
        return self.open_source(
            collection.out.folder,
            collection.completion_progress,
            checkpoint,
            prompt_tokens=longest,
            answer_tokens=tokens,
        )

    @contextmanager
    def open_source(
        self,
        folder: Path,
        completion_progress: CompletionProgress,
        checkpoint: Checkpoint,
        *,
        prompt_tokens: int,
        answer_tokens: int,
    ) -> Iterator[CompletionSource]:
        """Yield the source of completions: the recipe's server, or the processes of this job.

        Args:
            folder: of the stage, in which a killed run leaves what it had.
            prompt_tokens: of the longest prompt.
        """
        context_tokens = prompt_tokens + answer_tokens + 1
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

        file = self.export_file(checkpoint)
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

    def export_file(self, checkpoint: Checkpoint) -> Path | None:
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

        record = folder / f"together-{context_tokens}.json"
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
    # Each shard has a seed of its own, and each part of it a limit.
    file = folder / f"{_UNFINISHED}{sampling.seed}-{sampling.max_new_tokens}.jsonl"
    remove_finished_logs(folder, file if resumes else None)

    with TokenLog(file, len(prompts)) as log:

        def on_tokens(index: int, ids: Sequence[int], ended: Completion | None) -> None:
            log.append(index, ids)
            completion_progress.on_tokens(index, ids, ended)

        resume_from = log.resume_from
        if sampling.resume_from and not any(resume_from):
            resume_from = sampling.resume_from
            for index, ids in enumerate(resume_from):
                log.append(index, ids)
        return engine.generate(prompts, replace(sampling, resume_from=resume_from), on_tokens)


def read_limit(folder: Path) -> AnswerLimit | None:
    """Return the limit that the first answers of a trace stage have shown; None before that."""
    file = folder / LIMIT_FILE
    return AnswerLimit(**read_json(file)) if file.is_file() else None


def remove_finished_logs(folder: Path, kept: Path | None = None) -> None:
    """Remove the token logs of finished shards: all but ``kept``."""
    for file in folder.glob(f"{_UNFINISHED}*"):
        if file != kept:
            file.unlink()

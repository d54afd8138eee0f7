"""The engine of the traces: llama.cpp with a file of each model, where the file is the model.

A file is exported of a model once, and compared with torch on tokens that it generates. If it
differs by more than its number format explains, transformers answers, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.errors import GateError, ModelError, UsageError
from racdeploy.exporting import ExportResult
from racdeploy.extras import is_installed
from racdeploy.files.code_hashes import code_hash
from racdeploy.files.stages import Stage
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.export_stage import export_model, store_plainly
from racdeploy.pipeline.gates import judge_divergence
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.workspace import COMPUTE_LIBRARIES, Workspace, identify_code, notify
from racdeploy.plugins import require_package
from racdeploy.quant import presets
from racdeploy.recipe import Export
from racdeploy.verification.checks.logits import find_kl_limit
from racdeploy.verification.top_logits import (
    LogitDifferences,
    compare_top_logits,
    record_top_logits,
)

BACKEND = "llamacpp"
TRACE_QUANT = "q8_0"
"""Number format of the files: near enough to torch, and twice as fast as transformers on two cores
(benchmarks/RESULTS.md, "Engines for the traces")."""
_STAGE = "trace-file"
_COMPARED_PROMPTS = 4
_COMPARED_TOKENS = 64
"""Of each answer: 256 positions in all find a change of 2 % of them, and take torch seconds."""


@dataclass(frozen=True)
class TraceEngine:
    """llama.cpp for the answers of a job's models, as their calibration prompts are asked."""

    workspace: Workspace
    job: Job

    @property
    def open(self) -> Any:
        """Function that opens a file; other processes call it, too."""
        return partial(open_engine, BACKEND)

    @property
    def identity(self) -> Mapping[str, str]:
        """Number format, engine and the code of both: inputs of the traces."""
        engine = identify_code(f"racdeploy.engines.backends.{BACKEND}", ("llama-cpp-python",))
        return {**engine, "quant": TRACE_QUANT, "exporter": code_hash("racdeploy.exporting.gguf")}

    @property
    def label(self) -> str:
        """Engine and number format, for the plan."""
        return f"llama.cpp, from a {TRACE_QUANT} file"

    @cached_property
    def obstacle(self) -> str:
        """Reason why transformers answers in place of llama.cpp; empty if there is none.

        Raises:
            MissingExtraError: the recipe wants llama.cpp, and it is not installed.
            UsageError: the recipe wants llama.cpp, and the model has no GGUF form.
        """
        wanted = self.job.recipe.traces.engine
        if wanted == "transformers":
            return "the recipe asks for transformers"
        if wanted == BACKEND:
            require_package("llama_cpp")
        if not is_installed("llama_cpp"):
            return "llama-cpp-python is not installed"

        try:
            _plan_file(self.job)
        except (ModelError, UsageError) as error:
            if wanted == BACKEND:
                raise
            return error.message
        return ""

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Return False for a model that has no file, or whose file was found to differ from it.

        Where the recipe wants llama.cpp, the export raises an error for a file that differs.
        """
        if self.obstacle or not _has_architecture(checkpoint):
            return False
        if self.job.recipe.traces.engine == BACKEND:
            return True
        compared = self._read_comparison(checkpoint)
        return not compared.get("difference")

    def export(self, checkpoint: Checkpoint) -> Path | None:
        """Return the file of a model, or None if it differs from the model under torch.

        Raises:
            GateError: it differs, and the recipe wants llama.cpp.
        """
        exported = self.write_file(checkpoint)
        stage = self.workspace.open(_STAGE, self._inputs(checkpoint))
        if not stage.is_finished:
            stage.finish(self._compare(checkpoint, exported.path))

        difference = stage.summary["difference"]
        if difference and self.job.recipe.traces.engine == BACKEND:
            raise GateError(
                "trace-file-differs",
                f"{exported.path.name}, which would answer for the traces: {difference}",
                remedy="leave traces.engine out: then transformers answers",
            )
        return None if difference else exported.path

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return engine, number format, and distance from torch, for the manifest."""
        compared = self._read_comparison(checkpoint)
        if self.obstacle or compared.get("difference"):
            return {"engine": "transformers", "quant": "f32"}
        return {"engine": BACKEND, "quant": TRACE_QUANT, **compared}

    def list_notes(self, checkpoint: Checkpoint) -> list[str]:
        """Return a note on the file that answered, or on why none did."""
        if self.obstacle:
            if self.job.recipe.traces.engine == "transformers":
                return []
            return [f"traces are made by transformers: {self.obstacle}"]

        compared = self._read_comparison(checkpoint)
        if difference := compared.get("difference"):
            return [f"traces are made by transformers, not by llama.cpp: {difference}"]
        if not compared:
            return []
        return [
            f"traces are made by llama.cpp from a {TRACE_QUANT} file: KL {compared['kl']:.1e} from "
            f"torch (limit {compared['kl_limit']:g}) and equal first choices at "
            f"{compared['same']:.1%} of {compared['positions']} positions of its own answers"
        ]

    def write_file(self, checkpoint: Checkpoint) -> ExportResult:
        """Return a model's file; the dense one's is also what the evaluation compares with."""
        settings = list_file_settings(self.job.recipe.export, TRACE_QUANT)
        is_dense = checkpoint.folder == self.job.model.folder
        name = name_dense(self.job, TRACE_QUANT)
        if not is_dense:
            name = f"{checkpoint.folder.name}-{TRACE_QUANT}"
        return export_model(
            self.workspace,
            checkpoint.folder,
            name,
            settings,
            metadata={},
            importance=None,
            label="export dense" if is_dense else "export",
        )

    def _inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what decides how far a file is from its model."""
        return identify_code(__name__, COMPUTE_LIBRARIES) | {
            "model": checkpoint.sha256,
            "tasks": self.job.tasks.identify_calibration(),
            "seed": self.job.recipe.traces.seed,
            "engine": dict(self.identity),
        }

    def _read_comparison(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what the comparison of a model's file found; empty if there was none yet."""
        stage = Stage.locate(self.workspace.work, _STAGE, self._inputs(checkpoint))
        return dict(stage.summary) if stage.is_finished else {}

    def _compare(self, checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
        """Return KL and equal first choices of a file on its own answers, and what is wrong."""
        job = self.job
        problems = job.problems("calibration")[:_COMPARED_PROMPTS]
        prompts = [job.encoder.encode(problem.question) for problem in problems]
        context_tokens = max(map(len, prompts)) + _COMPARED_TOKENS + 1
        settings = EngineSettings(context_tokens, 1, self.workspace.threads)

        sampling = Sampling(max_new_tokens=_COMPARED_TOKENS, stop_ids=checkpoint.eos_ids)
        with self.open(file, settings) as engine:
            answers = engine.generate(prompts, sampling)
        traces = [(tuple(p), a.ids) for p, a in zip(prompts, answers, strict=True)]

        # One model in memory at a time.
        with open_engine("transformers", checkpoint.folder, settings) as engine:
            expected = record_top_logits(engine, traces)
        with self.open(file, settings) as engine:
            rows = list(compare_top_logits(engine, traces, expected))

        kl_T, same_T, changed_T = (np.concatenate(column) for column in zip(*rows, strict=True))
        kl_limit = find_kl_limit([TRACE_QUANT])
        found = {
            "kl": float(kl_T.mean()),
            "kl_limit": kl_limit,
            "same": float(same_T.mean()),
            "positions": len(kl_T),
            "difference": "",
        }
        try:
            judge_divergence(LogitDifferences(kl_T, same_T, changed_T), kl_limit)
        except GateError as error:
            found["difference"] = error.message
            notify(f"transformers makes the traces, not llama.cpp: {error.message}")
        return found


def list_file_settings(recipe: Export, quant: str) -> Export:
    """Return the settings of a plain GGUF file of one number format.

    Engines get token ids: a pre-tokenizer that llama.cpp lacks does no harm.
    """
    return store_plainly(recipe if recipe.format == "gguf" else Export(), quant)


def name_dense(job: Job, quant: str) -> str:
    """Return the name of the dense model's file in a number format."""
    return f"{job.model.name}-dense-{quant}"


def _has_architecture(checkpoint: Checkpoint) -> bool:
    """Return whether llama.cpp has an architecture for a model, which may be cut."""
    from racdeploy.exporting.gguf.architecture import find_architecture

    try:
        find_architecture(checkpoint)
    except ModelError:
        return False
    return True


def _plan_file(job: Job) -> None:
    """Raise the error that stops the export of the dense model to a GGUF file, if there is one."""
    from racdeploy.exporting.gguf.sizes import FileSizes

    settings = list_file_settings(job.recipe.export, TRACE_QUANT)
    is_approximate = settings.accept_token_differences > 0
    sizes = FileSizes(job.checkpoint, settings.pre_tokenizer, approximate=is_approximate)
    sizes.plan(presets.read(TRACE_QUANT))

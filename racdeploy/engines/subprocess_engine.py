"""Engine whose model lives in a child process; requests are checked here, before sending."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy.engines import process_limits
from racdeploy.engines.engine import (
    Completion,
    Engine,
    EngineSettings,
    FinishReason,
    IsCancelled,
    Logits,
    OnTokens,
    Sampling,
)
from racdeploy.engines.engine_process import EngineProcess
from racdeploy.engines.sequence import check_ids, check_request
from racdeploy.errors import EngineError
from racdeploy.processes.messages import Header

STOP_SECONDS = 60.0  # longer than a step of a large model on a slow machine


class SubprocessEngine(Engine):
    """A model in a child process with the process id ``pid``.

    ``stats`` adds up over the engine's life: ``load_ms``, ``prompt_tokens``, ``generated_tokens``,
    ``prefill_s``, ``decode_s`` and ``decode_cpu_s`` (see ``Batcher``), and the child's
    ``peak_rss_bytes``. Several threads may use it: their sequences are decoded together, as many as
    there are slots.

    Args:
        module: loads the model in the child.
        name: of the engine, for error messages.
        step_seconds: maximum processor time of a step; None derives it from the files.
        options: for ``module``.
    """

    def __init__(
        self,
        module: str,
        name: str,
        path: Path,
        settings: EngineSettings,
        *,
        step_seconds: float | None = None,
        **options: Any,
    ) -> None:
        _check_settings(settings)
        if settings.memory_limit_bytes is None:
            settings = replace(
                settings, memory_limit_bytes=process_limits.memory_limit_bytes(path, settings)
            )
        if step_seconds is None:
            step_seconds = process_limits.step_limit_seconds(path, settings)

        self.stats, self.info = {}, {}
        self._settings = settings
        self._child = EngineProcess(module, name)
        self.pid = self._child.pid

        request = {
            "path": str(path.resolve()),
            "settings": asdict(settings),
            "step_seconds": step_seconds,
            **options,
        }

        try:
            loaded = self._ask("load", **request)
        except BaseException:  # also Ctrl-C: the child must not stay
            self._child.close()
            raise

        self.info = dict(loaded["info"])
        self._vocabulary = int(loaded["vocabulary"])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: IsCancelled | None = None,
    ) -> list[Completion]:
        check_request(prompts, sampling, self._settings.context_tokens, self._vocabulary)
        request = {
            "prompts": [list(map(int, ids)) for ids in prompts],  # numpy's are no JSON
            "sampling": _describe(sampling),
            "stream": on_tokens is not None,
        }

        header: Header = {}
        stop_deadline_s = float("inf")

        with self._child.request("generate", **request) as exchange:
            for answer in exchange:
                header = answer[0] if answer else {}
                for index, ids, ended in header.get("updates", ()):
                    assert on_tokens is not None
                    on_tokens(index, ids, _read(*ended) if ended else None)

                # Cancel once, and keep reading: the responses up to ``done`` still come.
                if cancelled is not None and cancelled():
                    cancelled = None
                    exchange.cancel()
                    stop_deadline_s = time.monotonic() + STOP_SECONDS

                if not exchange.is_done and time.monotonic() > stop_deadline_s:
                    self._child.kill()
                    raise EngineError(
                        "engine-stuck",
                        f"the engine did not stop within {STOP_SECONDS:.0f} s of being cancelled, "
                        "and was ended",
                        remedy="load the model again; a stranger's model may never stop",
                    )

        self.stats = header["stats"]
        return [_read(*values) for values in header["completions"]]

    def logits(self, ids: Sequence[int]) -> Logits:
        """Return float32 logits_TV of a teacher-forced pass, T × V × 4 bytes."""
        check_ids(ids, "the text", self._settings.context_tokens, self._vocabulary)
        request = {"ids": [int(token) for token in ids]}
        logits_TV = np.empty((len(ids), self._vocabulary), dtype=np.float32)

        with self._child.request("logits", **request) as exchange:
            for header, payload in filter(None, exchange):
                self.stats = header.get("stats", self.stats)

                if header["event"] == "rows":
                    start = header["start"]
                    values_L = np.frombuffer(payload, dtype="<f4")
                    rows_TV = values_L.reshape(-1, self._vocabulary)
                    logits_TV[start : start + len(rows_TV)] = rows_TV

        return logits_TV

    def is_alive(self) -> bool:
        return self._child.is_alive()

    def refuse_fork(self) -> None:
        """Raise ForkedError in a fork of the process that opened this engine."""
        self._child.refuse_fork()

    def close(self) -> None:
        self._child.close()

    def _ask(self, op: str, **values: Any) -> Header:
        with self._child.request(op, **values) as exchange:
            *_, (header, _) = filter(None, exchange)
        self.stats = header["stats"]
        return header


def _read(ids: list[int], reason: FinishReason, forced_at: int | None) -> Completion:
    return Completion(tuple(ids), reason, forced_at)


def _describe(sampling: Sampling) -> Header:
    """Return the sampling as a dict for JSON, without ``asdict``.

    Its deep copy would take longer than a token.
    """
    budget = vars(sampling.budget) if sampling.budget else None
    return {**vars(sampling), "budget": budget}


def _check_settings(settings: EngineSettings) -> None:
    """Raise EngineError for a setting out of its range."""
    ranges = {
        "context_tokens": range(1, 1 << 24),
        "parallel": range(1, 1025),
        "threads": range(513),  # ggml's maximum
        "memory_limit_bytes": range(1 << 60),
    }
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if value is not None and value not in allowed:
            raise EngineError(
                "bad-engine-setting",
                f"{name} is {value}, must be {allowed[0]} to {allowed[-1]}",
                remedy="threads = 0 uses every core" if name == "threads" else f"change {name}",
            )

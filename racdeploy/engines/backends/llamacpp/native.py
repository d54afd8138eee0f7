"""Load and run a GGUF file by llama.cpp's C API; only the child process imports it.

Every sequence has its own part of the key-value cache (``kv_unified`` off): other sequences do not
change its results, and each has the whole context length.
Source: llama.h of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from racdeploy import sparse_kernels
from racdeploy.engines.backends.llamacpp.grammar import SchemaGrammar
from racdeploy.engines.batching import BatchToken
from racdeploy.engines.engine import BATCH_TOKENS, EngineSettings, Logits, Sampling
from racdeploy.engines.process_limits import TOKENIZER_STACK_BYTES
from racdeploy.errors import EngineError
from racdeploy.processes.cores import available_cores
from racdeploy.processes.messages import Header

_ALWAYS_ALLOWED_CONTEXT = 32_768  # tokens, for any model
_MAX_CONTEXT_FACTOR = 8  # times the trained context: as far as rope scaling is used
_OUTPUT_ROWS = 64  # tokens of a teacher-forced pass whose logits are in memory at a time
# A model of 90 MB is faster with a context for each thread, one of 450 MB is slower.
_SMALL_BYTES = 128 * 2**20
# From ggml.h; llama-cpp-python's list is out of date.
_LOG_WARN = 3
_LOG_ERROR = 4
_LOG_CONTINUED = 5


def load(request: Header, settings: EngineSettings) -> _Vocabulary:
    """Load the GGUF file of a request, or only its vocabulary."""
    path = Path(request["path"])
    if request["vocabulary_only"]:
        return _Vocabulary(path)
    return NativeModel(path, settings)


class _Log:
    """Last errors of llama.cpp; errors and warnings also go to stderr, which survives an abort."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=8)
        self._is_shown = False
        # An attribute: the library uses it as long as it is loaded.
        self._callback = llama_cpp.llama_log_callback(self._receive)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level != _LOG_CONTINUED:
            self._is_shown = level in (_LOG_WARN, _LOG_ERROR)

        line = text.decode("utf-8", "replace")
        if not self._is_shown or not line.strip():
            return

        os.write(2, line.encode())
        if level != _LOG_WARN:
            self.lines.append(line.strip())

    def tail(self) -> str:
        return " | ".join(self.lines) or "no message"


class _Vocabulary:
    """The tokenizer of a file; no weight is read."""

    info: Mapping[str, Any] = {}
    context_tokens = 0

    def __init__(self, path: Path) -> None:
        self._log = _Log()
        remedy = "name another pre-tokenizer: export.pre_tokenizer in the recipe"
        self._load(path, f"the vocabulary of {path}", remedy, vocab_only=True)
        self.info = self._describe_tokens()

    def _load(self, path: Path, description: str, remedy: str, **params: int) -> None:
        llama_cpp.llama_backend_init()
        filled = _fill(llama_cpp.llama_model_default_params(), **params)
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), filled)
        if not self._model:
            raise EngineError(
                "load-failed",
                f"llama.cpp cannot load {description}: {self._log.tail()}",
                remedy=remedy,
            )

        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def decoders(self) -> list[_Context]:
        return []

    def teacher_forced_logits(self, ids: Sequence[int], start: int) -> Logits:
        raise NotImplementedError  # no weight is read

    @cached_property
    def _end_ids(self) -> set[int]:
        ids = range(self.vocabulary)
        return {token for token in ids if llama_cpp.llama_vocab_is_eog(self._vocab, token)}

    def _describe_tokens(self) -> Mapping[str, Any]:
        """Return the special tokens, the chat template, and the bytes of all tokens."""
        ids = range(self.vocabulary)
        template = llama_cpp.llama_model_chat_template(self._model, None)
        return {
            "bos_id": llama_cpp.llama_vocab_bos(self._vocab),
            "eos_id": llama_cpp.llama_vocab_eos(self._vocab),
            "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(self._vocab)),
            "stop_ids": sorted(self._end_ids),
            "control_ids": [
                token for token in ids if llama_cpp.llama_vocab_is_control(self._vocab, token)
            ],
            "pieces": [self._write_out(token).hex() for token in ids],
            "template": template.decode("utf-8", "replace") if template else "",
        }

    def _write_out(self, token: int) -> bytes:
        """Return the bytes of a token, also of a special one."""
        room, keep_spaces, special = 64, 0, True
        while True:
            piece = ctypes.create_string_buffer(room)
            length = llama_cpp.llama_token_to_piece(
                self._vocab, token, piece, room, keep_spaces, special
            )
            if length >= 0:
                return piece.raw[:length]
            room = -length

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in it are parsed, none are added."""
        return self._tokenizing.submit(self._tokenize, text.encode("utf-8")).result()

    @cached_property
    def _tokenizing(self) -> ThreadPoolExecutor:
        """The thread that tokenizes.

        llama.cpp splits a text by ``std::regex``, which calls itself for each character. In the
        8 MiB of an ordinary stack, a word of 26,000 letters would end the process.
        """
        executor = ThreadPoolExecutor(max_workers=1)
        default = threading.stack_size(TOKENIZER_STACK_BYTES)
        try:
            executor.submit(int).result()  # starts the thread, so that no other gets this stack
        except RuntimeError as error:  # "can't start new thread"
            raise MemoryError from error
        finally:
            threading.stack_size(default)
        return executor

    def _tokenize(self, data: bytes) -> list[int]:
        room = len(data) + 1
        add_special, parse_special = False, True

        for _ in range(2):
            tokens = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(
                self._vocab, data, len(data), tokens, room, add_special, parse_special
            )
            if count >= 0:
                return list(tokens[:count])
            room = -count  # more tokens than bytes: the vocabulary expands the text

        raise EngineError(
            "tokenize-failed",
            f"llama.cpp cannot tokenize a text of {len(data)} bytes: {self._log.tail()}",
        )


class NativeModel(_Vocabulary):
    """A loaded model and its contexts.

    llama.cpp synchronizes its threads after every operation. On a small model they wait longer than
    they compute, so every thread has its own context and decodes a share of the slots alone. The
    weights of a large model are read from memory once for all slots, by all threads.
    """

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        self._log = _Log()
        self._threads = settings.threads or available_cores()
        kernels = sparse_kernels.enable(path, settings.accel, threads=self._threads)

        # Sparse kernels pack weights while they are read; a mapping would only take memory.
        read, mapped = llama_cpp.LLAMA_LOAD_MODE_NONE, llama_cpp.LLAMA_LOAD_MODE_MMAP
        self._load(
            path,
            str(path),
            "export the model again; a file packed by racdeploy needs `racdeploy unpack` first",
            load_mode=read if kernels.tensors else mapped,
            use_extra_bufts=settings.repack_weights,
        )
        _check_context(settings.context_tokens, llama_cpp.llama_model_n_ctx_train(self._model))
        self.info = {
            **_describe(kernels, settings.accel == "require"),
            "processor": _name_processor(),
        }
        self.context_tokens = settings.context_tokens

        is_small = llama_cpp.llama_model_size(self._model) <= _SMALL_BYTES
        count = min(self._threads, settings.parallel) if is_small else 1

        self._contexts = []
        for index in range(count):
            slots = len(range(index, settings.parallel, count))
            context = _Context(
                self._model, settings, slots=slots, log=self._log, vocabulary=self.vocabulary
            )
            self._contexts.append(context)

    def decoders(self) -> list[_Context]:
        return self._contexts

    def make_grammar(self, sampling: Sampling) -> SchemaGrammar | None:
        """Return a grammar of the sampling's schema; None without one."""
        if sampling.schema is None:
            return None

        # The answer ends with a token that stops the sequence, not with another of llama.cpp's.
        others = self._end_ids.difference(sampling.stop_ids)
        return SchemaGrammar(self._vocab, sampling.schema, sampling.budget, others)

    def teacher_forced_logits(self, ids: Sequence[int], start: int) -> Logits:
        context = self._contexts[0]
        context.share_threads(1)
        if start == 0:
            context.clear_slot(0)

        chosen = enumerate(ids[start : start + _OUTPUT_ROWS], start)
        rows = [BatchToken(token, position, 0, True) for position, token in chosen]
        context.decode(rows)
        return np.stack([context.logits_V(row) for row in range(len(rows))])


class _Context:
    """A llama.cpp context: some slots that are decoded together, a ``batching.Decoder``."""

    def __init__(
        self, model: Any, settings: EngineSettings, *, slots: int, log: _Log, vocabulary: int
    ) -> None:
        self.slots = slots
        self.batch_tokens = BATCH_TOKENS
        self._all_threads = settings.threads or available_cores()
        self._threads = 0  # not set yet: llama.cpp's default
        self._log = log
        self._vocabulary = vocabulary

        cache_type = getattr(llama_cpp, f"GGML_TYPE_{settings.cache_dtype.upper()}")
        flash = (llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)
        self._context = llama_cpp.llama_init_from_model(
            model,
            _fill(
                llama_cpp.llama_context_default_params(),
                n_ctx=settings.context_tokens * slots,  # of all slots together
                n_seq_max=slots,
                n_batch=BATCH_TOKENS,
                n_ubatch=BATCH_TOKENS,
                n_outputs_max=max(_OUTPUT_ROWS, slots),
                type_k=cache_type,
                type_v=cache_type,
                flash_attn_type=flash[settings.flash_attention],
                kv_unified=False,
            ),
        )

        if not self._context:
            raise EngineError(
                "context-out-of-memory",
                f"llama.cpp cannot make a context of {slots} × {settings.context_tokens} tokens: "
                f"{log.tail()}",
                remedy="lower context_tokens or parallel; the key-value cache must fit in memory",
            )

        self._memory = llama_cpp.llama_get_memory(self._context)
        one_slot = 1  # of each token
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, one_slot)

    def share_threads(self, busy: int) -> None:
        """Use an equal share of all threads."""
        threads = max(1, self._all_threads // busy)
        if threads != self._threads:
            llama_cpp.llama_set_n_threads(self._context, threads, threads)
            self._threads = threads

    def decode(self, rows: Sequence[BatchToken]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, row in enumerate(rows):
            batch.token[index] = row.token
            batch.pos[index] = row.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.slot
            batch.logits[index] = row.wants_logits

        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            llama_cpp.llama_memory_clear(self._memory, True)
            raise EngineError(
                "decode-failed",
                f"llama.cpp failed to decode {len(rows)} tokens (status {status}): "
                f"{self._log.tail()}",
                remedy="lower context_tokens or parallel, or export the model again",
            )

    def logits_V(self, row: int) -> Logits:
        """Return the logits of a row of the last batch: a view that the next batch overwrites."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise EngineError(
                "decode-failed", f"llama.cpp has no logits for row {row}: {self._log.tail()}"
            )
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def clear_slot(self, slot: int) -> None:
        first, last = -1, -1  # all positions
        llama_cpp.llama_memory_seq_rm(self._memory, slot, first, last)


def _describe(kernels: sparse_kernels.KernelChoice, required: bool) -> Mapping[str, Any]:
    """Return the kernels of the loaded model, and how many weights they have.

    A build for GPUs may keep weights there. EngineError where the kernels are ``required``.
    """
    offered = len(kernels.tensors)
    packed = kernels.count_packed()
    if packed == offered:
        return {"kernels": str(kernels), "sparse_weights": packed}

    summary = (
        f"llama.cpp gave the sparse kernels {packed} of {offered} weights, "
        "and the others to another device"
    )
    if required:
        raise EngineError("kernels-passed-over", summary, remedy="leave out --accel require")

    return {"kernels": summary, "sparse_weights": packed}


def _name_processor() -> str:
    """Return the instruction sets that llama.cpp was built for and uses, as AVX2 and AVX512."""
    described = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
    used = re.findall(r"(\w+) = 1\b", described)
    return ", ".join(used) or "a processor without extensions"


def _check_context(tokens: int, trained: int) -> None:
    """Refuse a context far beyond the model's: its memory is allocated at once."""
    max_tokens = max(_ALWAYS_ALLOWED_CONTEXT, _MAX_CONTEXT_FACTOR * trained)
    if tokens > max_tokens:
        raise EngineError(
            "context-too-large",
            f"context_tokens is {tokens:,}, and the model is made for {trained:,}",
            remedy=f"use at most {max_tokens:,}",
        )


def _fill(params: Any, **values: int) -> Any:
    """Set fields of a ctypes structure, which itself accepts unknown names silently."""
    known = {field[0] for field in params._fields_}
    for name, value in values.items():
        if name not in known:
            raise EngineError(
                "llamacpp-too-old",
                f"llama-cpp-python {llama_cpp.__version__} has no setting {name!r}",
                remedy='pip install --upgrade "llama-cpp-python>=0.3.36"',
            )

        setattr(params, name, value)

    return params

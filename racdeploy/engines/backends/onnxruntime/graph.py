"""What a decoder graph looks like from outside: inputs, outputs, number formats, kind of cache.

Source: inputs of onnxruntime-genai's model builder 0.15 and of optimum-onnx 0.1; operator
GroupQueryAttention, onnxruntime/docs/ContribOperators.md 1.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike, NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as states

from racdeploy.errors import EngineError
from racdeploy.files.reading import read_json
from racdeploy.manifest import CONFIGURATIONS
from racdeploy.packing.raconnx import load_sidecar

Array = NDArray[Any]
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TOKENS = "input_ids"
_MASK = "attention_mask"
_POSITIONS = "position_ids"
_KEPT = "num_logits_to_keep"
# onnxruntime's own exceptions; its Python code adds the two plain ones.
_ERRORS = (
    *(states.EPFail, states.EngineError, states.Fail, states.InvalidArgument, states.InvalidGraph),
    *(states.InvalidProtobuf, states.ModelLoaded, states.NoModel, states.NoSuchFile),
    *(states.NotImplemented, states.RuntimeException, RuntimeError, ValueError),
)
_REMEDY = "export the model again, and see that every file of it was copied"


@contextmanager
def engine_errors(what: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn an exception of onnxruntime into an EngineError that says what could not be done."""
    try:
        yield
    except _ERRORS as error:
        said = " ".join(str(error).split())
        raise EngineError(
            "onnxruntime-failed", f"onnxruntime cannot {what}: {said}", remedy=remedy
        ) from error


def open_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load a graph for the CPU; weights that are packed beside it are joined first."""
    packed = load_sidecar(path)
    with engine_errors(f"load {path}"):
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in packed.values()]
        if values:
            options.add_external_initializers(list(packed), values)
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)

    # onnxruntime reads these arrays in place, as long as the session lives.
    session.packed_weights = packed
    return session


@dataclass(frozen=True)
class CacheTensor:
    """One key or value cache: input, output and shape without batch and length."""

    past: str
    present: str
    heads: int
    head_size: int
    dtype: type[np.generic]

    def zeros(self, rows: int, length: int) -> Array:
        """Return a cache of some sequences."""
        return np.zeros((rows, self.heads, length, self.head_size), dtype=self.dtype)

    def view(self, buffer_L: Array, length: int) -> Array:
        """Return the beginning of a flat buffer as the cache of one sequence."""
        size = self.heads * length * self.head_size
        return buffer_L[:size].reshape(1, self.heads, length, self.head_size)


class DecoderGraph:
    """A session whose graph is a decoder with a key-value cache; another graph is refused.

    ``shares_buffer`` says that past and present may be one buffer of the largest length
    (GroupQueryAttention); other graphs append to the past, so that the present is a longer tensor.
    ``last_only`` says that the graph gives the logits of the last token alone. ``folder`` is where
    a configuration has the head size that a graph may leave open, ``configuration`` the one that
    was read, if any.
    """

    def __init__(self, session: onnxruntime.InferenceSession, folder: Path) -> None:
        self.session = session
        self.configuration: Path | None = None
        self._inputs = {node.name: node for node in session.get_inputs()}
        self._outputs = {node.name: node for node in session.get_outputs()}

        pasts = list(filter(_PAST.fullmatch, self._inputs))
        others = self._inputs.keys() - pasts
        self._refuse_unknown(pasts, others)

        self._dtypes = {name: _dtype(self._inputs[name]) for name in others}
        self.logits_dtype = _dtype(self._outputs["logits"])
        self.caches = [self._read_cache(name, folder) for name in pasts]
        self.vocabulary, self.last_only = self._try_two_tokens()
        self.shares_buffer = self._takes_longer_past()

    def feeds(self, tokens: ArrayLike, lengths: ArrayLike, *, last: bool) -> dict[str, Array]:
        """Return the inputs beside the cache, in the number formats of the graph.

        Args:
            tokens: token_BT.
            lengths: length_B1: how many tokens are in the past of each row.
            last: ask for the logits of the last token alone, where the graph can leave out others.
        """
        token_BT = np.asarray(tokens)
        length_B1 = np.asarray(lengths)
        T = token_BT.shape[1]
        total_B1 = length_B1 + T  # past and new tokens

        values = {
            _TOKENS: token_BT,
            _MASK: np.arange(total_B1.max()) < total_B1,
            _POSITIONS: length_B1 + np.arange(T),
            _KEPT: np.array(int(last)),
        }

        return {
            name: np.ascontiguousarray(values[name], dtype=dtype)
            for name, dtype in self._dtypes.items()
        }

    def count_logits(self, feeds: dict[str, Array]) -> int:
        """Return of how many tokens of a sequence the graph gives logits."""
        keeps_last = _KEPT in feeds and feeds[_KEPT] == 1
        return 1 if self.last_only or keeps_last else feeds[_TOKENS].shape[1]

    def _refuse_unknown(self, pasts: list[str], others: set[str]) -> None:
        unknown = sorted(others - {_TOKENS, _MASK, _POSITIONS, _KEPT})
        if unknown:
            raise EngineError(
                "unknown-graph-inputs",
                f"the graph wants inputs that racdeploy does not know: {', '.join(unknown)}",
                remedy="export a decoder with past: its inputs are input_ids, attention_mask, "
                "position_ids and past_key_values.N.key and .value",
            )

        inputs = (_TOKENS, _MASK, "past_key_values.0.key", "past_key_values.0.value")
        outputs = ("logits", *map(_present, pasts))
        missing = [name for name in inputs if name not in self._inputs]
        missing += [name for name in outputs if name not in self._outputs]
        if missing:
            raise EngineError(
                "graph-not-decoder",
                "the graph is not a decoder with a key-value cache: "
                f"it has no {', '.join(missing)}",
                remedy="export it for text generation with past",
            )

    def _read_cache(self, name: str, folder: Path) -> CacheTensor:
        node = self._inputs[name]
        if len(node.shape) != 4 or not isinstance(node.shape[1], int):
            raise EngineError(
                "graph-not-decoder",
                f"{name} has shape {node.shape}, not batch × heads × length × head size",
            )

        dtype = _dtype(node)
        present = _present(name)
        if dtype not in (np.float32, np.float16) or _dtype(self._outputs[present]) != dtype:
            raise EngineError(
                "graph-type-unsupported",
                f"{name} is {node.type}; a cache is float or float16, past and present alike",
            )

        _, heads, _, size = node.shape
        if not isinstance(size, int):
            size, self.configuration = _read_head_size(folder, name)

        return CacheTensor(name, present, heads, size, dtype)

    def _try_two_tokens(self) -> tuple[int, bool]:
        """Run two tokens behind two empty ones; return the vocabulary and ``last_only``."""
        with engine_errors("run the graph on two tokens"):
            outputs = self._run_plain(tokens=2, past=2, length=2)

        logits = outputs["logits"]
        rows = logits.shape[1] if logits.ndim == 3 else 0

        wrong = 0
        for cache in self.caches:
            expected = (1, cache.heads, 4, cache.head_size)
            wrong += outputs[cache.present].shape != expected

        if logits.shape[0] != 1 or rows not in (1, 2) or wrong:
            raise EngineError(
                "graph-not-decoder",
                "the graph is not a decoder: two tokens behind two give logits of shape "
                f"{logits.shape} and {wrong} caches of another length than four",
                remedy=_REMEDY,
            )

        return int(logits.shape[2]), rows == 1

    def _takes_longer_past(self) -> bool:
        """Return whether a past may be longer than what is attended to, and stays that long."""
        try:
            outputs = self._run_plain(tokens=1, past=4, length=0)
        except (states.Fail, states.InvalidArgument, states.RuntimeException):
            return False  # its mask must cover the whole past: a graph that appends
        return bool(outputs[self.caches[0].present].shape[2] == 4)

    def _run_plain(self, *, tokens: int, past: int, length: int) -> dict[str, Array]:
        """Run zeros behind a past of which ``length`` tokens are attended to."""
        feeds = self.feeds([[0] * tokens], [[length]], last=False)
        for cache in self.caches:
            feeds[cache.past] = cache.zeros(1, past)

        names = list(self._outputs)
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


def _dtype(node: onnxruntime.NodeArg) -> type[np.generic]:
    if node.type not in _DTYPES:
        raise EngineError(
            "graph-type-unsupported",
            f"{node.name} has type {node.type}, racdeploy knows {', '.join(_DTYPES)}",
            remedy="export the model with float32 or float16 inputs and outputs",
        )
    return _DTYPES[node.type]


def _read_head_size(folder: Path, name: str) -> tuple[int, Path]:
    """Read it from a configuration in the folder of the graph, or in the one above; return both."""
    for place, file in product((folder, folder.parent), CONFIGURATIONS):
        if not (place / file).is_file():
            continue

        config = read_json(place / file)
        config = config.get("model", {}).get("decoder", config)
        size = config.get("head_size") or config.get("head_dim")
        if not size:
            size = config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
        if isinstance(size, int) and size > 0:
            return size, place / file

    raise EngineError(
        "no-head-size",
        f"the graph leaves the last dimension of {name} open, "
        "and no configuration tells the head size",
        remedy=f"put config.json into {folder} or the folder above it",
    )

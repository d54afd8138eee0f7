"""What a decoder graph looks like from outside: its inputs and outputs, number formats, sizes, and
kind of cache.

Names and shapes are read from the session; what they leave open is found by running the graph on
two tokens. A graph that wants an input which is not known here, or gives other shapes than a
decoder, is refused by name.
Source: inputs of onnxruntime-genai's model builder 0.15 and of optimum-onnx 0.1; operator
GroupQueryAttention, onnxruntime/docs/ContribOperators.md 1.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as states

from racdeploy.errors import EngineError
from racdeploy.packing.raconnx import load_sidecar
from racdeploy.storage.files import read_json

Array = NDArray[Any]
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TOKENS, _MASK, _POSITIONS, _KEPT = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "num_logits_to_keep",
)
_STATES = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf")
_MORE_STATES = ("ModelLoaded", "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException")
# onnxruntime's own exceptions; its Python code adds the two plain ones.
_ERRORS = (*(getattr(states, name) for name in (*_STATES, *_MORE_STATES)), RuntimeError, ValueError)
_REMEDY = "export the model again, and see that every file of it was copied"


@contextmanager
def engine_errors(what: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn an exception of onnxruntime into an EngineError that says what could not be done."""
    try:
        yield
    except _ERRORS as error:
        raise EngineError(
            f"onnxruntime cannot {what}: {' '.join(str(error).split())}", remedy=remedy
        ) from error


def open_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load a graph for the CPU; weights that are packed beside it are joined first.

    Raises:
        ArtifactError: the packed weights are damaged.
        EngineError: the file is damaged, or external data is missing, too short or outside its
            folder.
    """
    packed = load_sidecar(path)
    with engine_errors(f"load {path}"):
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in packed.items()
        }
        if values:
            options.add_external_initializers(list(values), list(values.values()))
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    session.packed_weights = (
        packed  # onnxruntime reads these arrays in place, as long as the session lives
    )
    return session


@dataclass(frozen=True)
class CacheTensor:
    """One key or value cache: input, output and shape without batch and length."""

    past: str
    present: str
    heads: int
    head_size: int
    dtype: type[np.generic]


class DecoderGraph:
    """A session whose graph is a decoder with a key-value cache.

    ``shares_buffer`` says that past and present may be one buffer of the largest length
    (GroupQueryAttention); other graphs append to the past, so that the present is a longer tensor.
    ``last_only`` says that the graph gives the logits of the last token alone.

    Args:
        session: the loaded graph.
        folder: where its configuration is, for a head size that the graph leaves open.

    Raises:
        EngineError: the graph is not a decoder that this backend knows.
    """

    def __init__(self, session: onnxruntime.InferenceSession, folder: Path) -> None:
        self.session = session
        self._inputs = {node.name: node for node in session.get_inputs()}
        self._outputs = {node.name: node for node in session.get_outputs()}
        self._refuse_unknown()
        self._dtypes = {
            name: _dtype(self._inputs[name]) for name in self._inputs if not _PAST.fullmatch(name)
        }
        self.logits_dtype = _dtype(self._outputs["logits"])
        self.caches = [self._cache(name, folder) for name in self._inputs if _PAST.fullmatch(name)]
        self.vocabulary, self.last_only = self._try_two_tokens()
        self.shares_buffer = self._takes_longer_past()

    def feeds(
        self, tokens_BT: Array, mask_BP: Array, positions_BT: Array, *, last: bool
    ) -> dict[str, Array]:
        """Return the inputs beside the cache, in the number formats of the graph.

        Args:
            tokens_BT: token ids.
            mask_BP: 1 where the row attends, past and new tokens.
            positions_BT: place of each token in its sequence.
            last: only the logits of the last token are wanted, if the graph can leave out the
                others.
        """
        values = {
            _TOKENS: tokens_BT,
            _MASK: mask_BP,
            _POSITIONS: positions_BT,
            _KEPT: np.array(int(last)),
        }
        return {
            n: np.ascontiguousarray(values[n], dtype=dtype) for n, dtype in self._dtypes.items()
        }

    def _refuse_unknown(self) -> None:
        known = {_TOKENS, _MASK, _POSITIONS, _KEPT}
        if unknown := sorted(
            name for name in self._inputs if name not in known and not _PAST.fullmatch(name)
        ):
            raise EngineError(
                f"the graph wants inputs that racdeploy does not know: {', '.join(unknown)}",
                remedy="export a decoder with past: its inputs are input_ids, attention_mask, position_ids and "
                "past_key_values.N.key and .value",
            )
        needed = [_TOKENS, _MASK, "past_key_values.0.key", "past_key_values.0.value"]
        missing = [name for name in needed if name not in self._inputs]
        presents = [_present(name) for name in self._inputs if _PAST.fullmatch(name)]
        missing += [name for name in ("logits", *presents) if name not in self._outputs]
        if missing:
            raise EngineError(
                f"the graph is not a decoder with a key-value cache: it has no {', '.join(missing)}",
                remedy="export it for text generation with past",
            )

    def _cache(self, name: str, folder: Path) -> CacheTensor:
        node = self._inputs[name]
        if len(node.shape) != 4 or not isinstance(node.shape[1], int):
            raise EngineError(
                f"{name} has shape {node.shape}, not batch × heads × length × head size"
            )
        dtype = _dtype(node)
        if dtype not in (np.float32, np.float16) or _dtype(self._outputs[_present(name)]) != dtype:
            raise EngineError(
                f"{name} is {node.type}; a cache is float or float16, past and present alike"
            )
        size = node.shape[3] if isinstance(node.shape[3], int) else _head_size(folder, name)
        return CacheTensor(name, _present(name), node.shape[1], size, dtype)

    def _try_two_tokens(self) -> tuple[int, bool]:
        """Run two tokens behind two of an empty past; return the vocabulary and whether one row of
        logits came.
        """
        with engine_errors("run the graph on two tokens"):
            outputs = self._run_plain(tokens=2, past=2, mask=4)
        logits = outputs["logits"]
        rows = logits.shape[1] if logits.ndim == 3 else 0
        wrong = [
            c.present
            for c in self.caches
            if outputs[c.present].shape != (1, c.heads, 4, c.head_size)
        ]
        if logits.shape[0] != 1 or rows not in (1, 2) or wrong:
            raise EngineError(
                f"the graph is not a decoder: two tokens behind two give logits of shape {logits.shape} and "
                f"{len(wrong)} caches of another length than four",
                remedy=_REMEDY,
            )
        return int(logits.shape[2]), rows == 1

    def _takes_longer_past(self) -> bool:
        """Return whether a past may be longer than what is attended to, and stays that long."""
        first = self.caches[0]
        try:
            return bool(self._run_plain(tokens=1, past=4, mask=1)[first.present].shape[2] == 4)
        except (states.Fail, states.InvalidArgument, states.RuntimeException):
            return False  # its mask must cover the whole past: a graph that appends

    def _run_plain(self, *, tokens: int, past: int, mask: int) -> dict[str, Array]:
        positions_BT = np.arange(mask - tokens, mask)[None]
        feeds = self.feeds(np.zeros((1, tokens)), np.ones((1, mask)), positions_BT, last=False)
        feeds |= {
            c.past: np.zeros((1, c.heads, past, c.head_size), dtype=c.dtype) for c in self.caches
        }
        names = list(self._outputs)
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


def _dtype(node: onnxruntime.NodeArg) -> type[np.generic]:
    if node.type not in _DTYPES:
        raise EngineError(
            f"{node.name} has type {node.type}, racdeploy knows {', '.join(_DTYPES)}",
            remedy="export the model with float32 or float16 inputs and outputs",
        )
    return _DTYPES[node.type]


def _head_size(folder: Path, name: str) -> int:
    """Read the head size from a configuration in the folder of the graph, or in the one above
    it.
    """
    for file in (
        where / known
        for where in (folder, folder.parent)
        for known in ("genai_config.json", "config.json")
    ):
        if not file.is_file():
            continue
        config = read_json(file)
        config = config.get("model", {}).get("decoder", config)
        heads = config.get("num_attention_heads") or 1
        size = (
            config.get("head_size")
            or config.get("head_dim")
            or config.get("hidden_size", 0) // heads
        )
        if isinstance(size, int) and size > 0:
            return size
    raise EngineError(
        f"the graph leaves the last dimension of {name} open, and no configuration tells the head size",
        remedy=f"put config.json into {folder} or the folder above it",
    )

"""Interface of a decoder graph: inputs, outputs, number formats, kind of cache.

Source: inputs of onnxruntime-genai's model builder 0.15 and 0.18, and of optimum-onnx 0.1; operator
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
from racdeploy.manifest import CONFIG_FILES

Array = NDArray[Any]
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_STATE = re.compile(r"past_conv\.\d+|past\.\d+\.conv|past_key_values\.\d+\.(conv|recurrent)_state")
_TOKENS = "input_ids"
_MASK = "attention_mask"
_POSITIONS = "position_ids"
_KEPT = "num_logits_to_keep"
# onnxruntime's own exceptions; its Python code adds the two plain ones.
_ERRORS = (
    states.EPFail, states.EngineError, states.Fail, states.InvalidArgument, states.InvalidGraph,
    states.InvalidProtobuf, states.ModelLoaded, states.NoModel, states.NoSuchFile,
    states.NotImplemented, states.RuntimeException, RuntimeError, ValueError,
)  # fmt: skip
_REMEDY = "export the model again, and see that every file of it was copied"


@contextmanager
def engine_errors(action: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn exceptions of onnxruntime into an EngineError: "onnxruntime cannot ``action``"."""
    try:
        yield
    except _ERRORS as error:
        reason = " ".join(str(error).split())
        raise EngineError(
            "onnxruntime-failed", f"onnxruntime cannot {action}: {reason}", remedy=remedy
        ) from error


def open_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load a graph for the CPU."""
    with engine_errors(f"load {path}"):
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


@dataclass(frozen=True)
class CacheTensor:
    """Keys, values or the state of one block, as an input and an output of the graph."""

    past: str
    present: str
    sizes: tuple[int | None, ...]  # without the batch; None is the length, which a state lacks
    dtype: type[np.generic]

    def zeros(self, rows: int, length: int) -> Array:
        """Return an empty cache of ``rows`` sequences."""
        sizes = [rows]
        for size in self.sizes:
            sizes.append(length if size is None else size)
        return np.zeros(sizes, dtype=self.dtype)


class DecoderGraph:
    """A session whose graph is a decoder with a key-value cache, and states of other blocks.

    Args:
        folder: holds a configuration with the head size, which a graph may leave open.

    Attributes:
        shares_buffer: whether past and present may be one buffer of the maximum length, as for
            GroupQueryAttention; in other graphs the present is a longer tensor than the past, and a
            state is another one.
        configuration: the file from which the head size was read, if any.

    Raises:
        EngineError: the graph is not such a decoder.
    """

    def __init__(self, session: onnxruntime.InferenceSession, folder: Path) -> None:
        self.session = session
        self.configuration: Path | None = None
        self._inputs = {node.name: node for node in session.get_inputs()}
        self._outputs = {node.name: node for node in session.get_outputs()}

        pasts = [name for name in self._inputs if _PAST.fullmatch(name) or _STATE.fullmatch(name)]
        other_inputs = self._inputs.keys() - pasts
        self._refuse_unknown(pasts, other_inputs)

        self._dtypes = {name: _dtype(self._inputs[name]) for name in other_inputs}
        _dtype(self._outputs["logits"])  # refuses others
        self.caches = [self._read_cache(name, folder) for name in pasts]
        self.vocabulary, self.has_last_logits_only = self._try_two_tokens()
        has_state = any(None not in cache.sizes for cache in self.caches)
        self.shares_buffer = not has_state and self._takes_longer_past()

    def feeds(self, tokens: ArrayLike, lengths: ArrayLike, *, last: bool) -> dict[str, Array]:
        """Return all inputs but the cache, in the number formats of the graph.

        Args:
            tokens: token_BT.
            lengths: length_B1, the number of tokens in the past of each row.
            last: ask for the logits of the last token only, if the graph has that input.
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

    def _refuse_unknown(self, pasts: list[str], other_inputs: set[str]) -> None:
        unknown = sorted(other_inputs - {_TOKENS, _MASK, _POSITIONS, _KEPT})
        if unknown:
            raise EngineError(
                "unknown-graph-inputs",
                f"the graph has inputs that racdeploy does not know: {', '.join(unknown)}",
                remedy="export a decoder with past: its inputs are input_ids, attention_mask, "
                "position_ids and past_key_values.N.key and .value",
            )

        outputs = ("logits", *map(_present, pasts))
        missing = [name for name in (_TOKENS, _MASK) if name not in self._inputs]
        if not any(map(_PAST.fullmatch, pasts)):
            missing.append("past_key_values.0.key")
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
        _, *sizes = node.shape
        if _PAST.fullmatch(name) and len(sizes) == 3:
            sizes[1] = None
            if not isinstance(sizes[2], int):
                sizes[2], self.configuration = _read_head_size(folder, name)

        if any(isinstance(size, str) for size in sizes) or len(sizes) not in (2, 3):
            raise EngineError(
                "graph-not-decoder",
                f"{name} has shape {node.shape}, not batch × heads × length × head size, "
                "or batch × channels × width for a state",
            )

        dtype = _dtype(node)
        present = _present(name)
        if dtype not in (np.float32, np.float16) or _dtype(self._outputs[present]) != dtype:
            raise EngineError(
                "graph-type-unsupported",
                f"{name} is {node.type}; a cache is float or float16, past and present alike",
            )

        return CacheTensor(name, present, tuple(sizes), dtype)

    def _try_two_tokens(self) -> tuple[int, bool]:
        """Run two tokens after two empty ones.

        Returns:
            The vocabulary size, and whether the graph returns logits of the last token only.
        """
        with engine_errors("run the graph on two tokens"):
            outputs = self._run_plain(tokens=2, past=2, length=2)

        logits = outputs["logits"]
        rows = logits.shape[1] if logits.ndim == 3 else 0

        wrong = sum(outputs[each.present].shape != each.zeros(1, 4).shape for each in self.caches)

        if logits.shape[0] != 1 or rows not in (1, 2) or wrong:
            raise EngineError(
                "graph-not-decoder",
                "the graph is not a decoder: two tokens after two give logits of shape "
                f"{logits.shape} and {wrong} caches of another shape than after four",
                remedy=_REMEDY,
            )

        return int(logits.shape[2]), rows == 1

    def _takes_longer_past(self) -> bool:
        """Return whether the graph accepts a past longer than its mask, and keeps that length."""
        try:
            outputs = self._run_plain(tokens=1, past=4, length=0)
        except (states.Fail, states.InvalidArgument, states.RuntimeException):
            return False  # the mask must cover the whole past, as in graphs that append
        return bool(outputs[self.caches[0].present].shape[2] == 4)

    def _run_plain(self, *, tokens: int, past: int, length: int) -> dict[str, Array]:
        """Run zeros after an empty past, of which the mask covers ``length`` tokens."""
        feeds = self.feeds([[0] * tokens], [[length]], last=False)
        for cache in self.caches:
            feeds[cache.past] = cache.zeros(1, past)

        names = list(self._outputs)
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def _present(past: str) -> str:
    return "present" + past.removeprefix("past").removeprefix("_key_values")


def _dtype(node: onnxruntime.NodeArg) -> type[np.generic]:
    if node.type not in _DTYPES:
        raise EngineError(
            "graph-type-unsupported",
            f"{node.name} has type {node.type}, racdeploy knows {', '.join(_DTYPES)}",
            remedy="export the model with float32 or float16 inputs and outputs",
        )
    return _DTYPES[node.type]


def _read_head_size(folder: Path, name: str) -> tuple[int, Path]:
    """Return the head size and its configuration file, in the graph's folder or the one above."""
    for parent, config_name in product((folder, folder.parent), CONFIG_FILES):
        file = parent / config_name
        if not file.is_file():
            continue

        config = read_json(file)
        # onnxruntime-genai nests the decoder's settings.
        config = config.get("model", {}).get("decoder", config)
        size = config.get("head_size") or config.get("head_dim")
        if not size:
            size = config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
        if isinstance(size, int) and size > 0:
            return size, file

    raise EngineError(
        "no-head-size",
        f"the graph leaves the last dimension of {name} open, "
        "and no configuration holds the head size",
        remedy=f"copy the model's config.json into {folder} or the folder above",
    )

"""What 64 weights take sparse kernels and ggml's own from the cache, for ``board_forecast.py``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.tensors.ggml_types import GGML_TYPES
from racdeploy_kernels.ggml_plugin import Plugin, Product, find_kernels

_COLUMNS = 2048
_ROWS = (256, 768)  # of less than 2 MB; what a product costs besides is in both
_REPEATS = 4


def measure_ns(quant: str, zeros: float, threads: int) -> tuple[float, float]:
    """Return ggml's own nanoseconds and those of sparse kernels, when so many threads multiply.

    Each has a matrix of its own; of two threads that share a core both take longer.
    """
    kernels = find_kernels()
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    plugin = Plugin(kernels.library)
    if not plugin.enable([], 1):
        raise SystemExit("ggml does not take the plug-in")

    chunks = (_ROWS[1] - _ROWS[0]) * _COLUMNS / 64
    stock_ns, sparse_ns = 1e6 * (_measure_ms(plugin, quant, zeros, threads) / chunks)
    return float(stock_ns), float(sparse_ns)


def _measure_ms(plugin: Plugin, quant: str, zeros: float, threads: int) -> NDArray[np.float64]:
    """Return what the larger matrix takes more than the smaller one: both sides."""
    found = []
    for rows in _ROWS:
        product = Product(GGML_TYPES[quant].type_id, rows, _COLUMNS, 1, zeros, False)
        repeated = [plugin.times_ms(product, threads, [threads]) for _ in range(_REPEATS)]
        found.append(np.nanmin(np.array(repeated), axis=0)[:, 0])
    smaller_ms, larger_ms = found
    difference_ms: NDArray[np.float64] = larger_ms - smaller_ms
    return difference_ms

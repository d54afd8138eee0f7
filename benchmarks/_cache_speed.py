"""What 64 weights take sparse kernels and ggml's own from the cache, for ``board_forecast.py``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from statistics import mean

from racdeploy.accel.ggml_plugin import Plugin, Product, find_kernels
from racdeploy.storage.ggml_types import GGML_TYPES

_COLUMNS = 2048
_ROWS = (256, 768)  # of less than 2 MB; what a product costs besides is in both
_RUNS, _REPEATS = 200, 4


def measure_ns(quant: str, zeros: float, threads: int) -> tuple[float, float]:
    """Return ggml's own nanoseconds and those of sparse kernels, when so many threads multiply.

    They are of processor time: of two threads that share a core both take longer.
    """
    kernels = find_kernels()
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    file = kernels.library.find()
    if file is None:
        raise SystemExit("racdeploy accel build")

    plugin = Plugin(file)
    if not plugin.enable([], 1):
        raise SystemExit("ggml does not take the plug-in")

    def measure(_: int) -> tuple[float, float]:
        number = GGML_TYPES[quant].number
        products = [Product(number, rows, _COLUMNS, 1, zeros, False) for rows in _ROWS]
        few, many = (
            [min(times) for times in zip(*repeated, strict=True)]
            for repeated in (
                [plugin.times_ms(product, 1, _RUNS) for _ in range(_REPEATS)]
                for product in products
            )
        )
        chunks = (_ROWS[1] - _ROWS[0]) * _COLUMNS / 64
        stock_ns, sparse_ns = (
            1e6 * (after - before) / chunks for before, after in zip(few, many, strict=True)
        )
        return stock_ns, sparse_ns

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(measure, range(threads)))
    return mean(stock for stock, _ in found), mean(sparse for _, sparse in found)

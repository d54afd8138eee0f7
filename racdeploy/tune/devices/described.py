"""A device's profile for a reader: a table, and the TOML file of a target that has it."""

from __future__ import annotations

from typing import Any

from racdeploy.report.settings import as_toml
from racdeploy.report.tables import Table
from racdeploy.targets import Device, Target
from racdeploy.tune.devices.engines import file_bits, read_bits
from racdeploy.tune.devices.kernels import read_zeros
from racdeploy.tune.devices.work import packed_bits

_DIGITS = 4


def render_target(target: Target, device: Device) -> str:
    """Return the TOML file of a target with a device, which ``--target FILE.toml`` reads."""
    made = "Made by racdeploy bench --profile" if device.measured else "Estimated"
    values = target.describe() | {"device": _round(device.model_dump(mode="json"))}
    return f"# {made}; picoseconds a weight, for each token decoded.\n{as_toml(values)}"


def list_costs(device: Device) -> Table:
    """Return what each number format costs, the cheapest from memory first.

    What sparse kernels multiply is named with its zeros, as ``q8_0 0.5``.
    """
    rows = []
    for engine, costs in device.engines.items():
        found = []
        for quant, cost in costs.formats.items():
            found.append((quant, file_bits(engine, quant), read_bits(engine, quant), cost))

        for quant, own in costs.sparse.items():
            for zeros, cost in own.items():
                packed = packed_bits(quant, read_zeros(zeros))
                found.append((f"{quant} {zeros}", file_bits(engine, quant), packed, cost))

        for name, stored, read, cost in sorted(found, key=lambda each: each[-1].streamed_ps):
            read_bytes_per_s = read / 8 / (cost.streamed_ps / 1e12)
            rows.append(
                (
                    engine,
                    name,
                    f"{stored:.4g}",
                    f"{cost.cached_ps:.1f}",
                    f"{cost.streamed_ps:.1f}",
                    f"{read_bytes_per_s / 1e9:.1f}",
                    f"{cost.resident:.2f}",
                )
            )

    plural = "s" if device.threads > 1 else ""
    title = f"{device.name}, {device.threads} thread{plural}"
    columns = (
        *("engine", "quant", "bits", "ps/weight in cache", "from memory", "GB/s"),
        "memory/file",
    )
    return Table(title, columns, tuple(rows))


def _round(value: Any) -> Any:
    """Return nested values with as many digits as mean something."""
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value

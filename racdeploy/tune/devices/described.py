"""A device's profile for a reader: a table, and the TOML file of a target that has it."""

from __future__ import annotations

from typing import Any

from racdeploy.report.settings import as_toml
from racdeploy.report.tables import Table
from racdeploy.targets import Device, Target
from racdeploy.tune.devices.engines import file_bits, read_bits

_DIGITS = 4


def render_target(target: Target, device: Device) -> str:
    """Return the TOML file of a target with a device, which ``--target FILE.toml`` reads."""
    made = "Made by racdeploy bench --profile" if device.measured else "Estimated"
    values = target.describe() | {"device": _round(device.model_dump(mode="json"))}
    return f"# {made}; picoseconds a weight, for each token decoded.\n{as_toml(values)}"


def list_costs(device: Device) -> Table:
    """Return what each number format costs, the cheapest from memory first."""
    rows = []
    for engine, costs in device.engines.items():
        by_price = sorted(costs.formats.items(), key=lambda item: item[1].streamed_ps)
        for quant, cost in by_price:
            bits = file_bits(engine, quant)
            read_bytes_per_s = read_bits(engine, quant) / 8 / (cost.streamed_ps / 1e12)
            rows.append(
                (
                    engine,
                    quant,
                    f"{bits:.4g}",
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

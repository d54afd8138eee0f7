"""How do time and memory of pruning grow with tokens, width and blocks? Measured on random weights.

    python -m benchmarks.growth --out build/growth

Prunes small Qwen2-shaped models, each in a process of its own, along one axis at a time, and fits
the exponent: 1 is proportional. Writes growth.csv, growth.md, and growth.html with the plots. Time
is the processor's, over all threads; memory is what is above that of a process that prunes next to
nothing.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._settings import add_settings, with_settings
from benchmarks.any_size import prune, write_model
from racdeploy.report import axis as axes

BASE = {"tokens": 8192, "width": 512, "blocks": 2}
QUANTITIES = ("CPU s", "MiB above that")
AXES = {
    "tokens": [8192, 16384, 32768, 65536, 131072, 262144],
    "width": [256, 512, 1024],
    "blocks": [2, 4, 8],
}
HEAD_SIZE, INNER = 64, 4  # the last linear of a block is as many times as wide
NOTHING = {"tokens": 64, "width": 64, "blocks": 1}


@dataclass(frozen=True)
class Row:
    """One model pruned."""

    axis: str
    tokens: int
    width: int
    blocks: int
    cpu_seconds: float
    peak_mib: float


def main() -> None:
    """Prune along each axis, fit, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=AXES["tokens"], help="of that axis"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    add_settings(parser)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = with_settings({"prune": {"sparsity": 0.5}}, arguments.set)["prune"]
    base_mib = measure(arguments, NOTHING, "", chosen).peak_mib
    rows = []

    for axis in arguments.axes:
        for value in arguments.tokens if axis == "tokens" else AXES[axis]:
            rows.append(measure(arguments, BASE | {axis: value}, axis, chosen))
            print(rows[-1], flush=True)

    with (arguments.out / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)

    (arguments.out / "growth.md").write_text(table(rows, base_mib), encoding="utf-8")
    (arguments.out / "growth.html").write_text(page(rows, base_mib), encoding="utf-8")
    print(table(rows, base_mib))


def measure(
    arguments: argparse.Namespace, shape: Mapping[str, int], axis: str, chosen: dict[str, Any]
) -> Row:
    """Write one model and prune it in a process of its own."""
    width, blocks = shape["width"], shape["blocks"]
    folder = arguments.out / f"random-{width}-{blocks}"
    if not (folder / "config.json").is_file():
        heads = {
            "num_attention_heads": width // HEAD_SIZE,
            "num_key_value_heads": max(width // HEAD_SIZE // 4, 1),
        }
        sizes = {"hidden_size": width, "intermediate_size": INNER * width, "vocab_size": 4096}
        write_model(folder, blocks, sizes | heads)

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(prune, (folder, shape["tokens"], arguments.threads, chosen))

    return Row(
        axis, shape["tokens"], width, blocks, found["cpu_seconds"], found["peak_bytes"] / 2**20
    )


def table(rows: list[Row], base_mib: float) -> str:
    """Return Markdown: every row, and the exponents of each axis."""
    lines = ["| axis | tokens | width | blocks | CPU s | peak MiB |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.axis} | {r.tokens} | {r.width} | {r.blocks} "
        f"| {r.cpu_seconds:.1f} | {r.peak_mib:.0f} |"
        for r in rows
    ]
    lines += ["", f"A process that prunes next to nothing takes {base_mib:.0f} MiB.", ""]
    lines += ["| axis | exponent of time | exponent of memory above that |", "|---|---|---|"]
    for axis in dict.fromkeys(row.axis for row in rows):
        slopes = [fit(places(rows, axis, quantity, base_mib))[0] for quantity in QUANTITIES]
        lines.append(f"| {axis} | {slopes[0]:.2f} | {slopes[1]:.2f} |")

    return "\n".join(lines) + "\n"


def places(rows: list[Row], axis: str, quantity: str, base_mib: float) -> list[tuple[float, float]]:
    """Return what was varied and what was measured, along one axis."""
    own = [row for row in rows if row.axis == axis]
    values = [
        r.cpu_seconds if quantity == "CPU s" else max(r.peak_mib - base_mib, 1.0) for r in own
    ]
    return list(zip((getattr(row, axis) for row in own), values, strict=True))


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return exponent and start of the line through the binary logarithms, by least squares."""
    at, values = np.log2(np.array(points)).T
    slope, start = np.polyfit(at, values, 1)
    return float(slope), float(start)


def page(rows: list[Row], base_mib: float) -> str:
    """Return the plots: time and memory along each axis, both logarithmic, with the fitted line."""
    charts = [
        chart(places(rows, axis, quantity, base_mib), axis, quantity)
        for axis in dict.fromkeys(row.axis for row in rows)
        for quantity in QUANTITIES
    ]
    style = (
        "svg{width:460px;font:12px sans-serif}"
        ".grid{stroke:#ddd}.fit{stroke:#888}.point{fill:#2463a8}"
    )
    head = (
        f"<!doctype html><meta charset=utf-8><title>How pruning grows</title><style>{style}</style>"
    )
    return f"{head}<h1>How pruning grows</h1>{''.join(charts)}<pre>{table(rows, base_mib)}</pre>\n"


_CHART = """\
{% from "charts.svg.jinja" import svg, axes, text, title %}
{% call svg(quantity ~ " against " ~ axis) %}
{{ axes(x, y) }}
<line class="fit" x1="{{ ends[0] }}" y1="{{ ends[1] }}" x2="{{ ends[2] }}" y2="{{ ends[3] }}"/>
{{ text(ends[0] + 60, y.stop + 12, "exponent %.2f" | format(slope)) }}
{% for (size, value), (across, up) in points %}
<circle class="point" cx="{{ across | px }}" cy="{{ up | px }}" r="4">
{{ title("%g %s: %.1f %s" | format(size, axis, value, quantity)) }}
</circle>
{% endfor %}
{% endcall %}
"""


def chart(points: list[tuple[float, float]], axis: str, quantity: str) -> str:
    """Draw one quantity along one axis."""
    at, values = np.log2(np.array(points)).T
    slope, start = fit(points)
    fitted = start + slope * at
    low, high = min(*values, *fitted), max(*values, *fitted)
    x = axes.across(axis, at.min(), at.max(), lambda tick: f"{2**tick:.0f}")
    y = axes.upward(quantity, low, high, lambda tick: f"{2**tick:.3g}")

    template = axes.load_templates().from_string(_CHART)
    places = [(x(along), y(value)) for along, value in zip(at, values, strict=True)]
    ends = (x(at[0]), y(fitted[0]), x(at[-1]), y(fitted[-1]))
    return template.render(
        x=x,
        y=y,
        axis=axis,
        quantity=quantity,
        slope=slope,
        ends=ends,
        points=zip(points, places, strict=True),
    )


if __name__ == "__main__":
    main()

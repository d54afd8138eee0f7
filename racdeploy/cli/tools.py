"""Commands that inspect files, list plugins and targets, and check the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from racdeploy import plugins
from racdeploy.api import functions
from racdeploy.api.builds import note_replaced
from racdeploy.cli.console import (
    out,
    print_json,
    print_notes,
    print_result,
    say,
    show,
)
from racdeploy.cli.options import JsonOpt, flag
from racdeploy.errors import EnvironmentFailure, UsageError

if TYPE_CHECKING:
    from racdeploy.exporting import MeasuredTensor
    from racdeploy.report.tables import ReportTable

_SHOWN_ROWS = 1000


def inspect(
    path: Path = typer.Argument(help="File of weights, model folder, or bundle."),
    summary: bool = flag("--summary", "Print no table of tensors."),
    json_output: JsonOpt = False,
) -> None:
    """Print types, sizes, zeros and hashes of a file or folder, and all its tensors."""
    from racdeploy.report.terminal import print_table

    contents = functions.inspect(path)
    if json_output:
        print_json(contents.to_json())
        return

    tensors = contents.tensors
    if tensors and not summary:
        _print_tensors(tensors)

    # Last, so that it is not scrolled away by hundreds of tensors.
    if tensors:
        print_table(_add_up_types(tensors), out)
    else:
        show("no tensors: a vocabulary alone")
    for key, value in contents.summary.items():
        show(f"{key}: {value!s:.200}")


def _print_tensors(tensors: Sequence[MeasuredTensor]) -> None:
    from racdeploy.bundles.inspect import bits_per_weight
    from racdeploy.report.tables import ReportTable
    from racdeploy.report.terminal import print_table

    rows = [
        (
            f"{row.name:.200}",
            " × ".join(map(str, row.shape)),
            row.type,
            f"{bits_per_weight(row):.2f}",
            _format_zeros(row.zeros),
            row.packing,
            f"{row.size_bytes:,}",
        )
        for row in tensors[:_SHOWN_ROWS]
    ]

    columns = ("tensor", "shape", "type", "bits", "zeros", "packing", "bytes")
    print_table(ReportTable("", columns, tuple(rows)), out)
    if len(tensors) > _SHOWN_ROWS:
        show(f"{len(tensors) - _SHOWN_ROWS:,} more tensors: --json lists them")


def _format_zeros(zeros: float | None) -> str:
    return "unknown" if zeros is None else f"{zeros:.1%}"


def _add_up_types(tensors: Sequence[MeasuredTensor]) -> ReportTable:
    """Return the number of tensors and bytes of each type, the largest first."""
    from racdeploy.report.tables import ReportTable, format_bytes

    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for row in tensors:
        counts[row.type] += 1
        sizes[row.type] += row.size_bytes

    rows = [(kind, str(counts[kind]), format_bytes(size)) for kind, size in sizes.most_common()]
    return ReportTable("", ("type", "tensors", "size"), tuple(rows))


def unpack(
    file: Path = typer.Argument(help="Packed file, .racgguf."),
    out_file: Path | None = typer.Option(
        None, "--out", "-o", help="File to write; default: next to it."
    ),
    json_output: JsonOpt = False,
) -> None:
    """Unpack a packed file into the plain one."""
    from racdeploy.exporting.gguf import unpack as write_plain
    from racdeploy.files.writing import file_sha256
    from racdeploy.packing.racgguf import SUFFIX

    if file.suffix != SUFFIX:
        raise UsageError(
            "unknown-suffix",
            f"{file} is not a {SUFFIX} file",
            remedy="other programs read it as it is; see racdeploy inspect",
        )

    replaced = note_replaced(out_file)
    plain = write_plain(file, out_file)

    details: dict[str, object] = {"path": str(plain), "size_bytes": plain.stat().st_size}
    if json_output:  # it was compared with the packed file's hash while writing
        details["sha256"] = file_sha256(plain)
    print_result(details, [plain], json_output)
    print_notes(replaced)


def targets(json_output: JsonOpt = False) -> None:
    """List the deployment targets."""
    from racdeploy.targets import Target

    known_targets = [Target.read(name) for name in Target.names()]
    if json_output:
        print_json({target.name: target.model_dump() for target in known_targets})
        return

    for target in known_targets:
        pruning = ", ".join(target.narrowest.list_cuts()) or "nothing pruned"
        limits = f"{target.context_tokens} tokens, {target.memory_limit_bytes / 1e9:g} GB"
        line = f"{target.name:<16}{target.format}, {target.quant}, {pruning}, {limits}"

        show(line)
        if len(target.rungs) > 1:
            show(f"{'':<16}rungs: {', '.join(map(str, target.rungs))}")
        show(f"{'':<16}{target.description}", "dim")


def families(
    check: Path | None = typer.Option(
        None, "--check", metavar="FOLDER", help="Compare a model with the nearest family."
    ),
    json_output: JsonOpt = False,
) -> None:
    """List the model families, with linears that stay dense and parts that can be cut."""
    from racdeploy.models.family_support import compare_folder, describe_families

    if check:
        comparison = asdict(compare_folder(check))
        lines = [f"nearest: {comparison['family']}"]
        for kind in ("unknown_settings", "unknown_tensors", "missing_tensors"):
            lines.append(f"{kind.replace('_', ' ')}: {', '.join(comparison[kind]) or 'none'}")
        print_result(comparison, lines, json_output)
        return

    rows = describe_families()
    if json_output:
        print_json({"families": [asdict(row) for row in rows]})
        return

    for row in rows:
        show(f"{row.family:<16} {row.models}")
        details = [
            f"transformers {row.transformers}",
            f"llama.cpp {row.gguf}",
            f"cuts {', '.join(row.cuts) or 'nothing'}",
        ]
        if row.stays_dense:
            details.append(f"dense: {', '.join(row.stays_dense)}")
        show(f"{'':<16}{'; '.join(details)}", "dim")


def list_plugins(json_output: JsonOpt = False) -> None:
    """List all plugins by kind."""
    names_by_kind = {kind: list(plugins.list_names(kind)) for kind in plugins.KINDS}
    lines = (f"{kind}: {', '.join(names)}" for kind, names in names_by_kind.items())
    print_result(names_by_kind, lines, json_output)


def init(
    file: Path | None = typer.Argument(
        None, help="File to write; default: recipe.toml, or racdeploy-gate.toml."
    ),
    gate: bool = flag("--gate", "Write a gate file instead."),
    force: bool = flag("--force", "Replace an existing file."),
) -> None:
    """Write a recipe or a gate file with comments, to edit."""
    from racdeploy.files.writing import write_atomic
    from racdeploy.recipe import EXAMPLE
    from racdeploy.verification.gate import GATE_EXAMPLE

    file = file or Path("racdeploy-gate.toml" if gate else "recipe.toml")
    if file.exists() and not force:
        raise UsageError(
            "output-exists", f"{file} exists", remedy="name another file, or add --force"
        )

    write_atomic(file, GATE_EXAMPLE if gate else EXAMPLE)
    show(file)
    next_step = f"verify BUNDLE --gate {file}" if gate else f"build --recipe {file}"
    say(f"next: racdeploy {next_step}")


def doctor(
    gpu: bool = flag("--gpu", "Compare the GPU with the CPU, step by step."),
    stand_in: bool = flag("--stand-in", "Compare the CPU with itself, where there is no GPU."),
    json_output: JsonOpt = False,
) -> None:
    """Report installed and missing parts of this machine, and how to install them."""
    from racdeploy.cli.doctor import compare_gpu, examine

    findings = compare_gpu(stand_in) if gpu or stand_in else examine()
    lines = (f"{each['state']:>8}  {each['what']}: {each['detail']}" for each in findings)
    print_result({"findings": findings}, lines, json_output)
    if {"missing", "wrong"} & {finding["state"] for finding in findings}:
        raise typer.Exit(EnvironmentFailure.exit_code)

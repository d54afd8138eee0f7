"""Commands that look, list and prepare, from ``inspect`` to ``doctor``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from racdeploy import plugins
from racdeploy.cli.console import (
    err,
    out,
    print_json,
    print_notes,
    print_result,
    reported,
    say_replaced,
    show,
)
from racdeploy.cli.options import JsonOpt, flag
from racdeploy.errors import EnvironmentFailure, UsageError

if TYPE_CHECKING:
    from racdeploy.report.tables import Table


@reported
def inspect(
    path: Path = typer.Argument(help="A file of weights, a model folder, or a bundle."),
    summary: bool = flag("--summary", "Leave out the table of tensors."),
    json_output: JsonOpt = False,
) -> None:
    """Show what is in a file or folder: types, sizes, zeros and hashes, and every tensor."""
    from racdeploy.bundles.inspect import inspect_path
    from racdeploy.report.terminal import print_table

    found = inspect_path(path)
    if json_output:
        print_json(found)
        return

    if not summary:
        _print_tensors(found["tensors"])

    # Last, where it can be read after hundreds of tensors.
    print_table(_add_up_types(found["tensors"]), out)
    for key, value in found["summary"].items():
        show(f"{key}: {value}")


def _print_tensors(tensors: Sequence[Mapping[str, Any]]) -> None:
    from racdeploy.report.tables import Table
    from racdeploy.report.terminal import print_table

    rows = [
        (
            row["name"],
            " × ".join(map(str, row["shape"])),
            row["type"],
            f"{row['bits']:.2f}",
            "unknown" if row["zeros"] is None else f"{row['zeros']:.1%}",
            row["packing"],
            f"{row['size_bytes']:,}",
        )
        for row in tensors
    ]

    columns = ("tensor", "shape", "type", "bits", "zeros", "packing", "bytes")
    print_table(Table("", columns, tuple(rows)), out)


def _add_up_types(tensors: Sequence[Mapping[str, Any]]) -> Table:
    """Return how many tensors and bytes there are of each type, the largest first."""
    from racdeploy.report.tables import Table, readable_bytes

    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for row in tensors:
        counts[row["type"]] += 1
        sizes[row["type"]] += row["size_bytes"]

    rows = [(kind, str(counts[kind]), readable_bytes(size)) for kind, size in sizes.most_common()]
    return Table("", ("type", "tensors", "size"), tuple(rows))


@reported
def unpack(
    file: Path = typer.Argument(help="A packed file, as .racgguf."),
    out_file: Path | None = typer.Option(
        None, "--out", "-o", help="File to write; default: beside it."
    ),
    json_output: JsonOpt = False,
) -> None:
    """Write the plain file that a packed one stands for."""
    from racdeploy import export as exports
    from racdeploy.files.writing import file_sha256

    if not exports.format_of(file):
        known = ", ".join(plugins.names("formats"))
        raise UsageError(
            "unknown-suffix",
            f"the name of {file} is of no format",
            remedy=f"formats are {known}; see racdeploy inspect",
        )

    replaced = [say_replaced(out_file)] if out_file and out_file.exists() else []
    plain = exports.load(exports.format_of(file)).unpack(file, out_file)

    details: dict[str, object] = {"path": str(plain), "size_bytes": plain.stat().st_size}
    if json_output:  # the hash was compared with the packed file's while it was written
        details["sha256"] = file_sha256(plain)
    print_result(details, [plain], json_output)
    print_notes(replaced)


@reported
def targets(json_output: JsonOpt = False) -> None:
    """List the deployment targets."""
    from racdeploy.targets import Target

    found = [Target.read(name) for name in Target.names()]
    if json_output:
        print_json({target.name: target.model_dump() for target in found})
        return

    for target in found:
        pruned = [f"{part} {share:g}" for part, share in target.keep.items()]
        if target.pattern != "unstructured":
            pruned.append(target.pattern)
        elif target.sparsity:
            pruned.append(f"{target.sparsity:.0%} zeros")

        what = ", ".join(pruned) or "nothing pruned"
        limits = f"{target.context_tokens} tokens, {target.memory_limit_bytes / 1e9:g} GB"
        line = f"{target.name:<16}{target.format}, {target.quant}, {what}, {limits}"

        show(line)
        show(f"{'':<16}{target.why}", "dim")


@reported
def families(json_output: JsonOpt = False) -> None:
    """List the model families: what of each is pruned, stays dense and can be cut."""
    from racdeploy.models.supported import describe_families

    found = describe_families()
    if json_output:
        print_json({"families": found})
        return

    for row in found:
        show(f"{row['family']:<16}{row['models']}")
        details = [
            f"transformers {row['transformers']}",
            f"llama.cpp {row['gguf']}",
            f"cuts {', '.join(row['cuts'])}",
        ]
        if row["stays_dense"]:
            details.append(f"dense: {', '.join(row['stays_dense'])}")
        show(f"{'':<16}{'; '.join(details)}", "dim")


@reported
def list_plugins(json_output: JsonOpt = False) -> None:
    """List every plugin by kind."""
    found = {kind: list(plugins.names(kind)) for kind in plugins.KINDS}
    lines = (f"{kind}: {', '.join(names)}" for kind, names in found.items())
    print_result(found, lines, json_output)


@reported
def init(
    file: Path | None = typer.Argument(
        None, help="File to write; default: recipe.toml, or racdeploy-gate.toml."
    ),
    gate: bool = flag("--gate", "Write a gate file instead."),
    force: bool = flag("--force", "Replace an existing file."),
) -> None:
    """Write a commented recipe, or a commented gate file."""
    from racdeploy.files.writing import write_atomic
    from racdeploy.recipe import EXAMPLE
    from racdeploy.verify.gate import GATE_EXAMPLE

    file = file or Path("racdeploy-gate.toml" if gate else "recipe.toml")
    if file.exists() and not force:
        raise UsageError(
            "output-exists", f"{file} exists", remedy="name another file, or add --force"
        )

    write_atomic(file, GATE_EXAMPLE if gate else EXAMPLE)
    out.print(file)
    next_step = f"verify BUNDLE --gate {file}" if gate else f"build --recipe {file}"
    err.print(f"next: racdeploy {next_step}", markup=False)


@reported
def doctor(json_output: JsonOpt = False) -> None:
    """Say what this machine has, what is missing, and how to get it."""
    from racdeploy.cli.doctor import examine

    findings = examine()
    lines = (f"{each['state']:>8}  {each['what']}: {each['detail']}" for each in findings)
    print_result({"findings": findings}, lines, json_output)
    if any(finding["state"] == "missing" for finding in findings):
        raise typer.Exit(EnvironmentFailure.exit_code)

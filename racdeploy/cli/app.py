"""The command line: one command per verb, no logic. A verb imports what it needs when it is called.

stdout carries the result, stderr the rest. Exit codes: 0 passed, 1 a gate failed, 2 wrong usage, recipe or bundle,
3 inconclusive where the gate forbids it, 4 an engine or the environment failed, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from racdeploy import __version__, plugins
from racdeploy.cli.console import err, out, print_json, progress_bars, reported
from racdeploy.errors import EngineError, GateError, InconclusiveError, UsageError

if TYPE_CHECKING:
    from racdeploy.pipeline.build import Build
    from racdeploy.pipeline.job import Job
    from racdeploy.report.model import Report
    from racdeploy.verify.gate import Gate

app = typer.Typer(
    name="racdeploy",
    help="Prune a reasoning model on its own chain of thought, export it, and prove that it still reasons.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

accel_app = typer.Typer(
    no_args_is_help=True, help="Kernels for sparse weights on stock engines; see docs/accel.md."
)
app.add_typer(accel_app, name="accel")

Kernels = Literal[
    "auto", "off", "require"
]  # accel.Mode, whose import takes as long as all of --help
Questions = Literal["chat", "completions"]  # served.ServerApi
ModelArg = Annotated[
    str | None,
    typer.Argument(help="Local folder, Hub id, or tiny-reasoner, the default.", show_default=False),
]
TargetOpt = Annotated[
    str | None, typer.Option("--target", help="Where it will run; see: racdeploy targets.")
]
AlsoOpt = Annotated[
    list[str] | None,
    typer.Option("--also", help="A further target, for another engine; repeatable."),
]
RecipeOpt = Annotated[
    Path | None, typer.Option("--recipe", help="TOML recipe; see: racdeploy init.")
]
TaskOpt = Annotated[
    list[str] | None,
    typer.Option("--task", help="Task to verify on: a name or jsonl:FILE; repeatable."),
]
CalibrationTaskOpt = Annotated[
    list[str] | None,
    typer.Option("--calibration-task", help="Task for the traces; default: --task."),
]
SparsityOpt = Annotated[float | None, typer.Option("--sparsity", help="Fraction of zeros, 0 to 1.")]
PatternOpt = Annotated[
    str | None, typer.Option("--pattern", help="unstructured, or N:M with N kept of M.")
]
MethodOpt = Annotated[str | None, typer.Option("--method", help="Pruning method.")]
SourceOpt = Annotated[
    str | None, typer.Option("--calibration", help="rac (prompt and thinking) or prompt.")
]
QuantOpt = Annotated[str | None, typer.Option("--quant", help="Number format of the linears.")]
PackingOpt = Annotated[str | None, typer.Option("--packing", help="How zeros are left out.")]
OutOpt = Annotated[Path | None, typer.Option("--out", help="Folder to write.")]
GateOpt = Annotated[
    Path | None, typer.Option("--gate", help="TOML file with limits; see docs/gate.md.")
]
TierOpt = Annotated[
    str, typer.Option("--tier", help="How much is verified: smoke, standard or release.")
]
WorkOpt = Annotated[
    Path | None, typer.Option("--work", help="Folder of stage results; default: user cache.")
]
ThreadsOpt = Annotated[int, typer.Option("--threads", help="CPU threads; 0 uses every core.")]
AccelOpt = Annotated[
    Kernels, typer.Option("--accel", help="Kernels for sparse weights; see: racdeploy accel build.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DryRunOpt = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")
]
PromptsOpt = Annotated[int | None, typer.Option("--prompts", help="Evaluation prompts.")]
TraceCountOpt = Annotated[int | None, typer.Option("--trace-prompts", help="Calibration prompts.")]
TraceServerOpt = Annotated[
    str | None,
    typer.Option(
        "--trace-server", help="OpenAI-compatible API that answers them, http://HOST:PORT/v1."
    ),
]


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
@reported
def build(
    model: ModelArg = None,
    target: TargetOpt = None,
    also: AlsoOpt = None,
    recipe: RecipeOpt = None,
    task: TaskOpt = None,
    calibration_task: CalibrationTaskOpt = None,
    sparsity: SparsityOpt = None,
    pattern: PatternOpt = None,
    method: MethodOpt = None,
    calibration: SourceOpt = None,
    quant: QuantOpt = None,
    packing: PackingOpt = None,
    prompts: PromptsOpt = None,
    trace_prompts: TraceCountOpt = None,
    trace_server: TraceServerOpt = None,
    out_folder: OutOpt = None,
    work: WorkOpt = None,
    gate: GateOpt = None,
    tier: TierOpt = "",
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Let dense models of about the artifact's size answer too."
        ),
    ] = False,
    threads: ThreadsOpt = 0,
    dry_run: DryRunOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Prune, export, verify and bundle: the main job."""
    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.planning import pruning_plan
    from racdeploy.pipeline.preflight import check_build
    from racdeploy.recipe import Recipe
    from racdeploy.storage.toml import read_toml
    from racdeploy.verify.controls import SAME_SIZE
    from racdeploy.verify.gate import read_gate

    read_gate(gate)
    options = _options(model, target, task, calibration_task, trace_prompts, trace_server, prompts)
    options |= _pruning(sparsity, pattern, method, calibration) | _export(quant, packing)
    options["gate"] = read_toml(gate) if gate else None
    options["also"] = tuple(also) if also else None
    options["verify"]["controls"] = (SAME_SIZE,) if controls else None
    with _building(Job.at_tier(Recipe.combine(recipe, options), tier), work, threads) as builder:
        if dry_run:
            _print_plan(check_build(builder.job, out_folder) | pruning_plan(builder), json_output)
            return
        folder, report = builder.run(out_folder)
    _finish(report, json_output, f"bundle: {folder}", builder.job.gate)


@app.command()
@reported
def traces(
    model: ModelArg = None,
    target: TargetOpt = None,
    recipe: RecipeOpt = None,
    task: TaskOpt = None,
    calibration_task: CalibrationTaskOpt = None,
    trace_prompts: TraceCountOpt = None,
    trace_server: TraceServerOpt = None,
    work: WorkOpt = None,
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Collect the model's chains of thought and print where they are."""
    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.preflight import check_model
    from racdeploy.recipe import Recipe

    options = _options(model, target, task, calibration_task, trace_prompts, trace_server, None)
    with _building(Job(Recipe.combine(recipe, options)), work, threads) as builder:
        check_model(builder.job)
        folder, _ = builder.traces()
    _print_folder(folder, json_output)


@app.command()
@reported
def prune(
    model: ModelArg = None,
    target: TargetOpt = None,
    recipe: RecipeOpt = None,
    task: TaskOpt = None,
    calibration_task: CalibrationTaskOpt = None,
    sparsity: SparsityOpt = None,
    pattern: PatternOpt = None,
    method: MethodOpt = None,
    calibration: SourceOpt = None,
    trace_prompts: TraceCountOpt = None,
    trace_server: TraceServerOpt = None,
    work: WorkOpt = None,
    threads: ThreadsOpt = 0,
    dry_run: DryRunOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Prune on the model's traces and print the folder of the sparse safetensors model."""
    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.planning import pruning_plan
    from racdeploy.pipeline.preflight import check_model
    from racdeploy.recipe import Recipe

    options = _options(model, target, task, calibration_task, trace_prompts, trace_server, None)
    options |= _pruning(sparsity, pattern, method, calibration)
    with _building(Job(Recipe.combine(recipe, options)), work, threads) as builder:
        check_model(builder.job)
        if dry_run:
            _print_plan(pruning_plan(builder), json_output)
            return
        pruned = builder.prune()
    if json_output:
        print_json(
            {"folder": str(pruned.folder), "sparsity": pruned.sparsity, "notes": pruned.notes}
        )
        return
    out.print(pruned.folder, soft_wrap=True)
    for note in pruned.notes:
        err.print(note, markup=False, soft_wrap=True)


@app.command()
@reported
def export(
    model: Annotated[str, typer.Argument(help="Model folder, dense or pruned.")],
    target: TargetOpt = None,
    quant: QuantOpt = None,
    packing: PackingOpt = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write.")] = None,
    json_output: JsonOpt = False,
) -> None:
    """Export a model folder as it is."""
    from racdeploy import export as exports
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.models.sources import resolve
    from racdeploy.recipe import Recipe

    resolved = resolve(model)
    settings = Recipe.combine(
        None, {"model": model, "target": target} | _export(quant, packing)
    ).export
    name = f"{resolved.name}-{settings.quant}"
    place = Path(
        exports.load(settings.format).artifact_path(name, settings.quant, settings.packing)
    )
    file = out_file or (place if len(place.parts) == 1 else Path(name) / place)
    result = exports.write(Checkpoint(resolved.folder), file, settings)
    details = {
        "path": str(result.path),
        "size_bytes": result.size_bytes,
        "files": dict(result.files),
    }
    print_json(details) if json_output else out.print(result.path, soft_wrap=True)
    for note in result.notes:
        err.print(note, markup=False)


@app.command()
@reported
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    gate: GateOpt = None,
    tier: TierOpt = "",
    baseline: Annotated[
        Path | None,
        typer.Option(help="Dense artifact to run too, or another bundle of the same dense model."),
    ] = None,
    server: Annotated[
        str,
        typer.Option(help="Verify what this OpenAI-compatible API serves, http://HOST:PORT/v1."),
    ] = "",
    server_model: Annotated[str, typer.Option(help="Name that the server gives the model.")] = "",
    server_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the server's key.")
    ] = "",
    server_api: Annotated[
        Questions, typer.Option(help="chat asks as users do; completions sends token ids.")
    ] = "chat",
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Print what the run can show, and do nothing.")
    ] = False,
    work: WorkOpt = None,
    accel: AccelOpt = "auto",
    junit_file: Annotated[Path | None, typer.Option("--junit", help="JUnit XML to write.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="HTML report to write.")] = None,
    reports: Annotated[
        Path | None, typer.Option("--reports", help="Folder for the report in every form.")
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Report only: a verdict is no exit code.")
    ] = False,
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Rerun the bundle's prompts on its artifact and compare with the dense records in it."""
    from racdeploy.bundles.bundle import Bundle
    from racdeploy.bundles.served import Server, ServerAnswerer
    from racdeploy.bundles.verify import ArtifactAnswerer, Reverification
    from racdeploy.report import html, junit
    from racdeploy.report.files import write_reports
    from racdeploy.storage.caches import default_work
    from racdeploy.storage.files import write_atomic

    if not server and (server_model or server_key_env):
        raise UsageError(
            "--server-model and --server-key-env belong to --server",
            remedy="add --server http://…/v1",
        )
    for file in (junit_file, html_file):
        if file and not file.resolve().parent.is_dir():
            raise UsageError(f"there is no folder {file.parent}", remedy=f"mkdir -p {file.parent}")
    with progress_bars() as progress:
        judged = Bundle(bundle, gate, tier)
        mode = "off" if server else accel
        local = ArtifactAnswerer(judged, work or default_work(), threads, mode, progress)
        asked = Server(server, server_model, server_key_env, server_api)
        again = Reverification(local, ServerAnswerer(local, asked) if server else None, baseline)
        if show_plan:
            _print_plan(again.plan(), json_output)
            return
        report, records = again.run()
    if junit_file:
        write_atomic(junit_file, junit.render(report))
    if html_file:
        write_atomic(html_file, html.render(report, records))
    if reports:
        write_reports(reports, report, records)
    _finish(report, json_output, "", again.gate, exit_zero)


@app.command()
@reported
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_thinking_tokens: Annotated[
        int | None, typer.Option(help="Close the thinking after so many.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: the bundle's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    show_thinking: Annotated[
        bool, typer.Option("--show-thinking", help="Print the thinking too.")
    ] = False,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Ask a bundle one question."""
    from racdeploy.runtime import load

    with load(bundle, threads=threads, accel=accel) as model:
        _print_kernels(model.engine.about.get("kernels", ""), accel)
        result = model.generate(
            prompt, max_thinking_tokens=max_thinking_tokens, temperature=temperature, seed=seed
        )
    if json_output:
        print_json(asdict(result))
        return
    if show_thinking:
        err.print(result.thinking, style="dim", markup=False)
    out.print(result.answer, markup=False, soft_wrap=True)
    if result.state == "open":
        err.print(
            f"the thinking did not end within {result.thinking_tokens} tokens", style="yellow"
        )


@app.command()
@reported
def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    dense: Annotated[
        Path | None,
        typer.Option(
            "--dense", help="Dense artifact; default: the one that the build left in --work."
        ),
    ] = None,
    artifact: Annotated[
        str,
        typer.Option(
            "--artifact", help="Path in the bundle of the artifact; default: the first one."
        ),
    ] = "",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Alternating runs of each artifact.")
    ] = 5,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=8, help="Length of the prompt.")
    ] = 256,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to decode.")] = 128,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, help="Sequences decoded together.")
    ] = 1,
    work: WorkOpt = None,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Measure speed and memory of an artifact beside the dense one, alternating in one run."""
    from statistics import median

    from racdeploy.bundles import bench as benchmark
    from racdeploy.report.tables import Table
    from racdeploy.report.terminal import print_table
    from racdeploy.storage.caches import default_work

    dense = dense or benchmark.find_dense(bundle, work or default_work(), artifact)
    load = benchmark.Load(rounds, prompt_tokens, new_tokens, parallel, threads, accel)
    with progress_bars() as progress:
        found = benchmark.bench(bundle, dense, load, progress, artifact=artifact)
    if json_output:
        print_json(found.to_json())
        return
    dense_median, pruned_median = found.medians()
    rows = []
    for name, label in benchmark.FIGURES.items():
        ratios = found.ratios(name)
        sides = (benchmark.figure_text(name, side[name]) for side in (dense_median, pruned_median))
        rows.append(
            (label, *sides, f"{median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}")
        )
    print_table(
        Table(
            "",
            (
                f"{parallel} at once" if parallel > 1 else "one sequence",
                "dense",
                "pruned",
                "ratio",
                f"range of {rounds}",
            ),
            tuple(rows),
        ),
        out,
    )
    err.print(f"dense: {found.dense}\npruned: {found.pruned}", markup=False, soft_wrap=True)
    _print_kernels(found.kernels, accel)


@app.command()
@reported
def inspect(
    path: Annotated[Path, typer.Argument(help="An exported file, a model folder, or a bundle.")],
    json_output: JsonOpt = False,
) -> None:
    """Show what is in a file or folder: tensors, types, zeros, hashes, template."""
    from racdeploy.bundles.inspect import inspect_path
    from racdeploy.report.tables import Table
    from racdeploy.report.terminal import print_table

    found = inspect_path(path)
    if json_output:
        print_json(found)
        return
    for key, value in found["summary"].items():
        out.print(f"{key}: {value}", markup=False, soft_wrap=True)
    rows = [
        (
            *(row["name"], " × ".join(map(str, row["shape"])), row["type"]),
            *(f"{row['bits']:.2f}", _share(row["zeros"]), row["packing"], f"{row['size_bytes']:,}"),
        )
        for row in found["tensors"]
    ]
    print_table(
        Table("", ("tensor", "shape", "type", "bits", "zeros", "packing", "bytes"), tuple(rows)),
        out,
    )


@app.command()
@reported
def unpack(
    file: Annotated[Path, typer.Argument(help="A packed file, as .racgguf.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="File to write; default: beside it.")
    ] = None,
    json_output: JsonOpt = False,
) -> None:
    """Write the plain file that a packed one stands for."""
    from racdeploy import export as exports
    from racdeploy.storage.files import file_sha256

    if not exports.format_of(file):
        known = ", ".join(plugins.names("formats"))
        raise UsageError(
            f"the name of {file} is of no format",
            remedy=f"formats are {known}; see racdeploy inspect",
        )
    plain = exports.load(exports.format_of(file)).unpack(file, out_file)
    if json_output:  # the hash was compared with the packed file's while it was written
        print_json(
            {"path": str(plain), "size_bytes": plain.stat().st_size, "sha256": file_sha256(plain)}
        )
    else:
        out.print(plain, soft_wrap=True)


@app.command()
@reported
def targets(json_output: JsonOpt = False) -> None:
    """List the deployment targets."""
    from racdeploy.targets import Target

    found = [Target.read(name) for name in Target.names()]
    if json_output:
        print_json({target.name: target.model_dump() for target in found})
        return
    for target in found:
        pattern = target.pattern if target.sparsity is None else f"{target.sparsity:.0%} zeros"
        limits = f"{target.context_tokens} tokens, {target.memory_limit_bytes / 1e9:g} GB"
        out.print(
            f"{target.name:<16}{target.format}, {target.quant}, {pattern}, {limits}", soft_wrap=True
        )
        out.print(f"{'':<16}{target.why}", style="dim", soft_wrap=True)


@app.command(name="plugins")
@reported
def list_plugins(json_output: JsonOpt = False) -> None:
    """List every plugin by kind."""
    found = {kind: list(plugins.names(kind)) for kind in plugins.KINDS}
    if json_output:
        print_json(found)
        return
    for kind, names in found.items():
        out.print(f"{kind}: {', '.join(names)}", soft_wrap=True)


@app.command()
@reported
def init(
    file: Annotated[
        Path | None,
        typer.Argument(help="File to write; default: recipe.toml, or racdeploy-gate.toml."),
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Write a gate file instead.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented recipe, or a commented gate file."""
    from racdeploy.recipe import EXAMPLE
    from racdeploy.storage.files import write_atomic
    from racdeploy.verify.gate import GATE_EXAMPLE

    file = file or Path("racdeploy-gate.toml" if gate else "recipe.toml")
    if file.exists() and not force:
        raise UsageError(f"{file} exists", remedy="name another file, or add --force")
    write_atomic(file, GATE_EXAMPLE if gate else EXAMPLE)
    out.print(file)
    next_step = f"verify BUNDLE --gate {file}" if gate else f"build --recipe {file}"
    err.print(f"next: racdeploy {next_step}", markup=False)


@app.command()
@reported
def doctor(json_output: JsonOpt = False) -> None:
    """Say what this machine has, what is missing, and how to get it."""
    from racdeploy.doctor import examine

    findings = examine()
    if json_output:
        print_json({"findings": findings})
    else:
        for finding in findings:
            out.print(
                f"{finding['state']:>8}  {finding['what']}: {finding['detail']}",
                markup=False,
                soft_wrap=True,
            )
    if any(finding["state"] == "missing" for finding in findings):
        raise typer.Exit(4)


@accel_app.command(name="build")
@reported
def build_kernels(json_output: JsonOpt = False) -> None:
    """Compile the kernels for sparse weights into the user's cache, and prove them on this machine.

    For llama.cpp and for onnxruntime, whichever are installed.
    """
    from racdeploy import accel

    built = accel.build_installed()
    refusals = [f"{engine}: {made.refusal}" for engine, made in built.items() if made.refusal]
    if json_output:
        print_json(
            {
                engine: asdict(made) | {"library": str(made.library or "")}
                for engine, made in built.items()
            }
        )
        raise typer.Exit(4 if refusals else 0)
    for engine, made in built.items():
        if made.library:
            out.print(made.library, soft_wrap=True)
        for quant, speedups in made.speedups.items():
            cells = ", ".join(
                f"{speedup:.2f}× at {float(zeros):.0%} zeros" for zeros, speedup in speedups.items()
            )
            err.print(
                f"{engine}, {quant}: {cells}, one token on one thread", markup=False, soft_wrap=True
            )
    if refusals:
        raise EngineError(
            f"kernels are not used: {'; '.join(refusals)}",
            remedy="everything runs without them, too",
        )


def _print_kernels(kernels: str, accel: Kernels) -> None:
    """Say in one line what ran a model, where sparse kernels were not switched off."""
    if kernels and accel != "off":
        err.print(f"kernels: {kernels}", style="dim", markup=False, soft_wrap=True)


def _share(zeros: float | None) -> str:
    return "unknown" if zeros is None else f"{zeros:.1%}"


@contextmanager
def _building(job: Job, work: Path | None, threads: int) -> Iterator[Build]:
    """Yield the build in the first process of a job; the others do their share and end here."""
    from racdeploy.pipeline.build import Build
    from racdeploy.prune.processes import join_processes
    from racdeploy.storage.caches import default_work

    with progress_bars() as progress, join_processes() as processes:
        show = progress if processes.rank == 0 else None
        builder = Build(job, work or default_work(), threads, show, processes)
        if processes.rank:
            builder.follow()
            raise typer.Exit
        yield builder


def _options(
    model: str | None,
    target: str | None,
    task: list[str] | None,
    calibration_task: list[str] | None,
    trace_prompts: int | None,
    trace_server: str | None,
    prompts: int | None,
) -> dict[str, Any]:
    return {
        "model": model,
        "target": target,
        "tasks": tuple(task) if task else None,
        "calibration_tasks": tuple(calibration_task) if calibration_task else None,
        "traces": {"count": trace_prompts, "server": trace_server},
        "verify": {"count": prompts},
    }


def _pruning(
    sparsity: float | None, pattern: str | None, method: str | None, calibration: str | None
) -> dict[str, Any]:
    return {
        "prune": {"sparsity": sparsity, "pattern": pattern, "method": method},
        "calibration": {"source": calibration},
    }


def _export(quant: str | None, packing: str | None) -> dict[str, Any]:
    return {"export": {"quant": quant, "packing": packing}}


def _print_plan(plan: dict[str, Any], json_output: bool) -> None:
    if json_output:
        print_json(plan)
        return
    for key, value in plan.items():
        out.print(
            f"{key}: {value:,}" if type(value) is int else f"{key}: {value}",
            markup=False,
            soft_wrap=True,
        )


def _print_folder(folder: Path, json_output: bool) -> None:
    print_json({"folder": str(folder)}) if json_output else out.print(folder, soft_wrap=True)


def _finish(
    report: Report, json_output: bool, last_line: str, gate: Gate, exit_zero: bool = False
) -> None:
    """Print the report, and end with the exit code of its one verdict, or with 0 where it is only reported."""
    from racdeploy.report.terminal import print_report

    if json_output:
        print_json(report.model_dump(mode="json"))
    else:
        print_report(report, out)
    if last_line:
        err.print(last_line, markup=False, soft_wrap=True)
    if exit_zero:
        return
    if report.verdict == "fail":
        raise typer.Exit(GateError.exit_code)
    if report.verdict == "inconclusive" and gate.inconclusive == "fail":
        raise typer.Exit(InconclusiveError.exit_code)

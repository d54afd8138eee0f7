"""Commands that run a bundle: ``run`` asks it, ``bench`` measures it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import typer

from racdeploy.cli.console import INTERRUPTED, err, out, print_json, reported, say
from racdeploy.cli.next_steps import WORTH_KERNELS
from racdeploy.cli.options import (
    AccelOpt,
    BudgetOpt,
    BundleArg,
    JsonOpt,
    Kernels,
    SeedOpt,
    ShowThinkingOpt,
    TargetOpt,
    TemperatureOpt,
    ThreadsOpt,
    WorkOpt,
    flag,
)
from racdeploy.cli.stream import (
    AnswerStream,
    check_question,
    clear_line,
    describe_cut,
    show_line,
    stopped_by_ctrl_c,
)
from racdeploy.errors import UsageError


@reported
def run(
    bundle: BundleArg,
    prompt: str = typer.Argument("-", help="What to ask; - reads it from stdin."),
    max_thinking_tokens: BudgetOpt = None,
    temperature: TemperatureOpt = None,
    seed: SeedOpt = 0,
    show_thinking: ShowThinkingOpt = False,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Ask a bundle one question; the answer is printed as it comes."""
    question = check_question(_read_question() if prompt == "-" else prompt)
    show_line(f"loading {bundle} …")

    from racdeploy.runtime import load

    stream = AnswerStream(show_thinking and not json_output, show_answer=not json_output)

    with load(bundle, threads=threads, accel=accel) as model:
        clear_line()
        zeros = model.manifest.pruning.get("sparsity", 0.0)
        _print_kernels(model.engine.about.get("kernels", ""), accel, zeros)

        with stopped_by_ctrl_c() as cancel:
            result = model.generate(
                question,
                max_thinking_tokens=max_thinking_tokens,
                temperature=temperature,
                seed=seed,
                on_text=stream.write,
                cancel=cancel,
            )

    stream.finish()
    if json_output:
        print_json(asdict(result))
    elif cut := describe_cut(result):
        err.print(cut, style="yellow")

    if result.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def _read_question() -> str:
    """Return what stdin holds; a terminal is not waited for."""
    if sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            "text-not-utf8", f"stdin is not text: {error}", remedy="give it in UTF-8"
        ) from error


@reported
def bench(
    bundle: Path | None = typer.Argument(None, help="Bundle folder; none with --profile."),
    dense: Path | None = typer.Option(
        None, help="Dense artifact; default: the one that the build left in --work."
    ),
    artifact: str = typer.Option(
        "", help="Path in the bundle of the artifact; default: the first one."
    ),
    rounds: int = typer.Option(5, min=1, help="Alternating runs of each artifact."),
    prompt_tokens: int = typer.Option(256, min=8, help="Length of the prompt."),
    new_tokens: int = typer.Option(128, min=2, help="Tokens to decode."),
    parallel: int = typer.Option(1, min=1, help="Sequences decoded together."),
    work: WorkOpt = None,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    profile: bool = flag("--profile", "Measure this device instead, and write a target."),
    target: TargetOpt = None,
    out_file: Path | None = typer.Option(
        None, "--out", help="With --profile: the target's TOML file; default: printed."
    ),
    json_output: JsonOpt = False,
) -> None:
    """Measure speed and memory of an artifact beside the dense one, alternating in one run."""
    if profile:
        _profile(target, threads, out_file, json_output)
        return
    if bundle is None:
        raise UsageError(
            "no-bundle-named",
            "there is no bundle to measure",
            remedy="racdeploy bench bundle; racdeploy bench --profile measures the device",
        )

    from racdeploy.bundles import bench as benchmark
    from racdeploy.cli.progress import show_progress
    from racdeploy.files.caches import default_work
    from racdeploy.manifest import Manifest
    from racdeploy.report.terminal import print_table

    dense = dense or benchmark.find_dense(bundle, work or default_work(), artifact)
    load = benchmark.Load(rounds, prompt_tokens, new_tokens, parallel, threads, accel)

    with show_progress(err) as progress:
        found = benchmark.bench(bundle, dense, load, progress, artifact=artifact)

    if json_output:
        print_json(found.to_json())
        return

    print_table(found.to_table(), out)
    say(f"dense: {found.dense}\npruned: {found.pruned}")
    zeros = Manifest.read(bundle).pruning.get("sparsity", 0.0)
    _print_kernels(found.kernels, accel, zeros)


def _profile(target: str | None, threads: int, file: Path | None, json_output: bool) -> None:
    """Measure llama.cpp on this device within a minute, and write or print a target with it."""
    from tempfile import TemporaryDirectory

    from racdeploy.cli.progress import show_progress
    from racdeploy.files.writing import write_atomic
    from racdeploy.processes.cores import available_cores
    from racdeploy.report.settings import as_toml
    from racdeploy.targets import Target
    from racdeploy.tune.speed import PROFILED, measure_device

    chosen = Target.read(target or "gguf")
    threads = threads or available_cores()
    with show_progress(err) as progress, TemporaryDirectory() as scratch:
        device = measure_device(Path(scratch), PROFILED, threads, progress)

    values = chosen.describe() | {"device": device.model_dump(mode="json")}
    text = f"# Made by racdeploy bench --profile.\n{as_toml(values)}"
    if file:
        write_atomic(file, text)
        say(f"use it: --target {file}")
    if json_output:
        print_json({"path": str(file) if file else "", **device.model_dump(mode="json")})
    elif not file:
        out.print(text, markup=False, highlight=False, soft_wrap=True, end="")


def _print_kernels(kernels: str, accel: Kernels, zeros: float) -> None:
    """Say in one line what ran a model, where its zeros make that a question."""
    matters = zeros >= WORTH_KERNELS or kernels.startswith("sparse")
    if kernels and matters and accel != "off":
        say(f"kernels: {kernels}", "dim")

"""Commands that run a bundle: ``run`` asks a question, ``bench`` measures speed and memory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import typer

from racdeploy.api import functions
from racdeploy.cli.console import INTERRUPTED, err, out, print_json, say
from racdeploy.cli.options import (
    AccelOpt,
    BudgetOpt,
    BundleArg,
    ContextOpt,
    JsonOpt,
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


def run(
    bundle: BundleArg,
    prompt: str = typer.Argument("-", help="Question; - reads it from stdin."),
    system: str = typer.Option("", help="System message."),
    max_thinking_tokens: BudgetOpt = None,
    max_new_tokens: int | None = typer.Option(
        None, min=1, help="Maximum tokens of thinking and answer; default: the bundle's."
    ),
    temperature: TemperatureOpt = None,
    top_p: float | None = typer.Option(
        None, min=0, max=1, help="Probability mass to sample from; default: the bundle's."
    ),
    seed: SeedOpt = 0,
    show_thinking: ShowThinkingOpt = False,
    context_tokens: ContextOpt = None,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Ask a bundle one question and stream the answer."""
    if prompt == "-":
        piped = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
        prompt = piped.decode(errors="surrogateescape")
    question = check_question(prompt)
    show_line(f"loading {bundle} …")

    from racdeploy.runtime import Conversation, load

    stream = AnswerStream(show_thinking and not json_output, show_answer=not json_output)

    with load(bundle, threads=threads, context_tokens=context_tokens, accel=accel) as model:
        clear_line()
        with stopped_by_ctrl_c() as cancel:
            result = Conversation(model, system).ask(
                question,
                max_thinking_tokens=max_thinking_tokens,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_text=stream.write,
                cancel=cancel,
            )

    stream.finish()
    if json_output:
        print_json(asdict(result))
    elif cut := describe_cut(result):
        say(cut, "yellow")

    if result.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def bench(
    bundle: Path | None = typer.Argument(None, help="Bundle folder; not with --profile."),
    dense: Path | None = typer.Option(
        None, help="Dense artifact; default: the build's, in the --work folder."
    ),
    rounds: int = typer.Option(5, min=1, help="Runs of each artifact, alternating."),
    prompt_tokens: int = typer.Option(256, min=8, help="Length of the prompt."),
    new_tokens: int = typer.Option(128, min=2, help="Tokens to decode."),
    parallel: int = typer.Option(1, min=1, help="Sequences decoded together."),
    work: WorkOpt = None,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    profile: bool = flag("--profile", "Measure this device instead, and write a target file."),
    target: TargetOpt = None,
    out_file: Path | None = typer.Option(
        None, "--out", help="With --profile: target file to write, TOML; default: stdout."
    ),
    json_output: JsonOpt = False,
) -> None:
    """Compare speed and memory of an artifact with the dense one, in alternating runs."""
    if profile:
        _profile(target, threads, out_file, json_output)
        return
    if bundle is None:
        raise UsageError(
            "no-bundle-named",
            "there is no bundle to measure",
            remedy="racdeploy bench bundle; racdeploy bench --profile measures the device",
        )

    from racdeploy.cli.progress import show_progress
    from racdeploy.report.terminal import print_table

    with show_progress(err) as progress:
        result = functions.bench(
            bundle,
            dense=dense,
            rounds=rounds,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            parallel=parallel,
            accel=accel,
            work=work,
            threads=threads,
            progress=progress,
        )

    if json_output:
        print_json(result.to_json())
        return

    print_table(result.to_table(), out)
    for role, file in zip(result.roles, (result.dense, result.pruned), strict=True):
        say(f"{role}: {file}")
    if result.warning:
        say(result.warning, "yellow")


def _profile(target: str | None, threads: int, file: Path | None, json_output: bool) -> None:
    """Measure llama.cpp on this device within a minute, and write or print it as a target."""
    from tempfile import TemporaryDirectory

    from racdeploy.cli.progress import show_progress
    from racdeploy.files.writing import make_parent, write_atomic
    from racdeploy.processes.cores import available_cores
    from racdeploy.report.toml_writer import to_toml
    from racdeploy.targets import Target
    from racdeploy.tuning.speed import make_profile_workload, measure_device

    if file:
        make_parent(file)
    chosen = Target.read(target or "gguf")
    threads = threads or available_cores()
    with show_progress(err) as progress, TemporaryDirectory() as scratch:
        device = measure_device(Path(scratch), make_profile_workload(), threads, progress)

    values = chosen.describe() | {"device": device.model_dump(mode="json")}
    text = f"# Made by racdeploy bench --profile.\n{to_toml(values)}"
    if file:
        write_atomic(file, text)
        say(f"use it: --target {file}")
    if json_output:
        print_json({"path": str(file) if file else "", **device.model_dump(mode="json")})
    elif not file:
        out.print(text, markup=False, highlight=False, soft_wrap=True, end="")

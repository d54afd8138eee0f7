"""Chat with a bundle in a terminal: streamed answers, and commands that begin with ``/``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from racdeploy.cli.console import err, say, say_error, show
from racdeploy.cli.options import (
    AccelOpt,
    BudgetOpt,
    BundleArg,
    ContextOpt,
    SeedOpt,
    ShowThinkingOpt,
    TemperatureOpt,
    ThreadsOpt,
)
from racdeploy.cli.stream import (
    AnswerStream,
    check_question,
    clear_line,
    describe_cut,
    show_line,
    stopped_by_ctrl_c,
)
from racdeploy.errors import RacdeployError, UsageError
from racdeploy.files.unprintable import drop_unprintable

if TYPE_CHECKING:
    from racdeploy.runtime import Conversation, GenerationResult, Model

_SEVERAL = '"""'
_HELP = {
    "/think N": "close the thinking after N tokens",
    "/think off": "use the bundle's default",
    "/thoughts": "show the thinking of the last answer",
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "continue a saved conversation",
    _SEVERAL: "begin or end a question of several lines",
    "/help": "show this list",
    "/bye": "leave, as Ctrl-D does",
}


def chat(
    bundle: BundleArg,
    system: str = typer.Option("", help="System message."),
    max_thinking_tokens: BudgetOpt = None,
    temperature: TemperatureOpt = None,
    seed: SeedOpt = 0,
    show_thinking: ShowThinkingOpt = False,
    context_tokens: ContextOpt = None,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
) -> None:
    """Chat with a bundle. From a pipe, each line is a question of its own, answered in one line."""
    show_line(f"loading {bundle} …")

    from racdeploy.runtime import Conversation, load

    with load(bundle, threads=threads, context_tokens=context_tokens, accel=accel) as model:
        clear_line()
        conversation = Conversation(model, system)
        talk = Chat(
            conversation,
            max_thinking_tokens=max_thinking_tokens,
            temperature=temperature,
            seed=seed,
            show_thinking=show_thinking,
        )

        if sys.stdin.isatty() and sys.stdout.isatty():
            _talk_in_terminal(talk, model)
        else:
            with suppress(EOFError):
                for line in sys.stdin.buffer:
                    talk.handle_alone(line.decode(errors="surrogateescape"))


@dataclass
class Chat:
    """A conversation with its settings."""

    conversation: Conversation
    max_thinking_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    show_thinking: bool = False

    def handle(self, line: str) -> None:
        """Run a command, or ask a question. The command ``/bye`` raises EOFError."""
        line = line.strip()
        if not line:
            return
        if not line.startswith("/"):
            self._ask(check_question(line))
            return

        name, _, argument = line.partition(" ")
        self._run_command(name, argument.strip())

    def handle_alone(self, line: str) -> None:
        """Handle a line of a pipe; a question has no context, and its answer is one line."""
        if line.startswith("/"):
            self.handle(line)
            return

        self.conversation.reset()
        if line.strip():
            self._ask(check_question(line), show_answer=False)
        turns = self.conversation.turns
        answer = " ".join(turns[0].result.answer.splitlines()) if turns else ""
        sys.stdout.write(drop_unprintable(answer) + "\n")
        sys.stdout.flush()

    def _ask(self, question: str, *, show_answer: bool = True) -> None:
        conversation = self.conversation
        dropped = conversation.dropped
        stream = AnswerStream(self.show_thinking, show_answer)
        started = time.perf_counter()
        show_line("reading …")

        try:
            with stopped_by_ctrl_c() as cancel:
                result = conversation.ask(
                    question,
                    max_thinking_tokens=self.max_thinking_tokens,
                    temperature=self.temperature,
                    seed=self.seed,
                    on_text=stream.write,
                    cancel=cancel,
                )
        finally:
            stream.finish()

        elapsed_s = time.perf_counter() - started
        self._print_statistics(result, elapsed_s, conversation.dropped - dropped)

    def _print_statistics(self, result: GenerationResult, elapsed_s: float, dropped: int) -> None:
        if cut := describe_cut(result):
            unseen = "" if result.answer else "; the next question is asked without it"
            say(cut + unseen, "yellow")
        if dropped:
            context_tokens = self.conversation.model.context_tokens
            turns = "the oldest turn" if dropped == 1 else f"the {dropped} oldest turns"
            say(f"{turns} left out: the context has {context_tokens:,} tokens", "yellow")

        if err.is_terminal:
            tokens = result.thinking_tokens + result.answer_tokens
            thought = f"thought for {result.thinking_tokens:,} tokens (/thoughts shows them), "
            prefix = thought if result.thinking_tokens else ""
            say(f"{prefix}{tokens / elapsed_s:,.0f} tokens/s", "dim")

    def _run_command(self, name: str, argument: str) -> None:
        conversation = self.conversation
        match name:
            case "/think":
                self._set_budget(argument)
            case "/thoughts":
                turns = conversation.turns
                thinking = turns[-1].result.thinking if turns else ""
                show(thinking or "there was no thinking", "dim")
            case "/reset":
                conversation.reset()
                say("forgotten: the next question is the first", "dim")
            case "/save":
                conversation.save(_name_file(argument, name))
                say(f"saved in {argument}", "dim")
            case "/load":
                file = _name_file(argument, name)
                self.conversation = type(conversation).load(conversation.model, file)
                say(f"{len(self.conversation.turns)} turns loaded", "dim")
            case "/help":
                for usage, meaning in _HELP.items():
                    say(f"{usage:<12} {meaning}", "dim")
            case "/bye":
                raise EOFError
            case _:
                known = dict.fromkeys(usage.split()[0] for usage in _HELP if usage != _SEVERAL)
                raise UsageError(
                    "unknown-chat-command",
                    f"there is no command {name}",
                    remedy=f"there are: {', '.join(known)}",
                )

    def _set_budget(self, argument: str) -> None:
        if argument and argument != "off":
            if not argument.isdecimal():
                raise UsageError(
                    "not-a-token-count", f"{argument} is no number of tokens", remedy="/think 512"
                )
            if self.conversation.model.tags is None:
                raise UsageError(
                    "no-thinking-tags",
                    "this model has no thinking tags, so there is nothing to close",
                )

        if argument:
            self.max_thinking_tokens = None if argument == "off" else int(argument)

        default_budget = self.conversation.model.settings.generation.max_thinking_tokens
        budget = default_budget if self.max_thinking_tokens is None else self.max_thinking_tokens
        limit = "no budget" if budget is None else f"a budget of {budget:,} tokens"
        say(f"thinking has {limit}", "dim")


def _talk_in_terminal(talk: Chat, model: Model) -> None:
    """Read lines with history; an error ends its line, not the conversation."""
    with suppress(ImportError):  # a Python that was built without it
        import readline  # noqa: F401 - input() uses it once it is imported

    name = model.settings.name
    engine = model.settings.artifact.backend
    context = f"{model.context_tokens:,} tokens of context"
    say(f"{name} on {engine}, {context}", "bold")
    say("/help lists commands. Ctrl-C stops an answer, Ctrl-D leaves.", "dim")

    for line in _ask_for_lines():
        try:
            talk.handle(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            say("stopped", "yellow")
        except (RacdeployError, OSError) as error:
            say_error(error)


def _ask_for_lines() -> Iterator[str]:
    """Yield typed lines until Ctrl-D, or Ctrl-C twice in a row."""
    interrupted = False
    while True:
        try:
            line = input("> ")
            if line.startswith(_SEVERAL):
                line = line.removeprefix(_SEVERAL)
                while _SEVERAL not in line:
                    line += "\n" + input(". ")
                line = line.replace(_SEVERAL, "")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            if interrupted:
                return
            interrupted = True
            say("Ctrl-C again leaves", "dim")
        except UnicodeDecodeError as error:
            say(f"this line is not text: {error}", "yellow")
        else:
            interrupted = False
            yield line


def _name_file(argument: str, command: str) -> Path:
    if not argument:
        raise UsageError("no-file-named", "which file?", remedy=f"{command} talk.json")
    return Path(argument).expanduser()

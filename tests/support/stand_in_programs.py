"""Programs of the documents on this machine alone: no network, no Docker, no second computer.

What a stand-in cannot do as written it reads at least: options, packages, extras, addresses.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement
from pip._internal.commands import create_command
from torch.distributed import run as torchrun

from tests.support.commands import command, environment, racdeploy
from tests.support.pasting import Call, Program, Reply
from tests.support.real_server import free_port, llama_cpp_server
from tests.support.stand_in_harness import VERSIONS
from tests.support.stand_in_harness import install as install_harness
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
HARNESS_TASK = "gsm8k_cot_zeroshot"
_IN_PROCESS = {"build", "tune", "traces", "prune", "recover", "export"}
"""Verbs that need torch, which this process has already."""


class StandIns:
    """The programs of one page.

    Args:
        planned: beginnings of commands of which only the plan is made.
        fewer: options that are added to a build, for the embedded model and for the others.
        parsed: beginnings of Python commands of which only the arguments are read.
        furnish: gives a folder what the reader has, a clone of this project among it.
    """

    def __init__(
        self,
        planned: Iterable[str],
        fewer: tuple[list[str], list[str]],
        parsed: Iterable[str],
        furnish: Callable[[Path], None],
    ) -> None:
        self._planned, self._fewer, self._parsed = planned, fewer, parsed
        self._furnish = furnish
        self.ports = {port: free_port() for port in ("8000", "8010", "8080")}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def programs(self) -> dict[str, Program]:
        """Return them by name."""
        return {
            "racdeploy": self.racdeploy,
            "python": self.python,
            "torchrun": self.torchrun,
            "uvicorn": self.uvicorn,
            "docker": self.docker,
            "make": self.make,
            "pytest": lambda call: Reply(instead=[sys.executable, "-m", "pytest", *call.arguments]),
            "git": self.clone,
            "pip": install,
            "pipx": install,
            "npm": install_scripts,
            "harness-pip": install_lm_eval,
            "vllm": self.serve_embedded,
            "llama-server": self.serve_embedded,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[StandIns]:
        """End the servers that are started meanwhile."""
        try:
            yield self
        finally:
            for server in self._servers.values():
                server.kill()
                server.wait()

    def racdeploy(self, call: Call) -> Reply:
        """Run a command as it is, as a plan, or with fewer prompts."""
        verb, *rest = call.arguments
        if _begins(self._planned, "racdeploy", call):
            rest += ["--dry-run"] * ("--dry-run" not in rest)
        elif verb in _IN_PROCESS and "--dry-run" not in rest:
            is_embedded = not rest or rest[0].startswith("-") or rest[0] == "tiny-reasoner"
            rest += self._fewer[not is_embedded]
            rest += ["--recover-tokens", "2000"] * ("--recover-tokens" in rest)

        if verb in _IN_PROCESS:
            done = racdeploy(verb, *rest, cwd=call.folder, **call.variables)
            return Reply(done.code, done.out, done.err)
        if verb == "serve":
            return self._start("8080", command(verb, *rest, "--port", self.ports["8080"]), call)
        return Reply(instead=command(verb, *rest))

    def python(self, call: Call) -> Reply:
        """Run a script, or read its arguments; make an environment without pip."""
        if call.arguments[:2] == ["-m", "venv"]:
            return _make_environment(call)
        if call.arguments[0] == "examples/browser/serve.py":
            ours = [sys.executable, *call.arguments, "--port", str(self.ports["8010"])]
            return self._start("8010", ours, call)
        if _begins(self._parsed, "python", call):
            return _read_arguments(call)
        return Reply(instead=[sys.executable, *call.arguments])

    def torchrun(self, call: Call) -> Reply:
        """Read torchrun's options, and run its program in one process."""
        asked = torchrun.get_args_parser().parse_args(call.arguments)
        assert (asked.module, asked.training_script) == (True, "racdeploy")
        return self.racdeploy(Call(asked.training_script_args, call.folder, call.variables))

    def uvicorn(self, call: Call) -> Reply:
        ours = [sys.executable, "-m", "uvicorn", *call.arguments, "--port", str(self.ports["8000"])]
        return self._start("8000", ours, call)

    def serve_embedded(self, call: Call) -> Reply:
        """Serve the embedded model in place of theirs, at the port that is asked for."""
        assert call.arguments[call.arguments.index("--port") + 1] == str(self.ports["8000"])
        return self.serve(next(call.folder.rglob("model.gguf")), call)

    def serve(self, file: Path, call: Call) -> Reply:
        """Serve a GGUF file at the port of other people's servers."""
        return self._start("8000", [*llama_cpp_server(file), "--port", self.ports["8000"]], call)

    def clone(self, call: Call) -> Reply:
        """Take the clone from this checkout, if the address is the project's."""
        verb, address = call.arguments
        assert (verb, address) == ("clone", REPOSITORY)
        folder = call.folder / address.rpartition("/")[2]
        self._furnish(folder)
        for name in ("Dockerfile", "Makefile", "pyproject.toml", "requirements"):
            (folder / name).symlink_to(ROOT / name)
        return Reply()

    def docker(self, call: Call) -> Reply:
        """Check what a build is given; run the image's entry point in the mounted folder."""
        parser = argparse.ArgumentParser(exit_on_error=False)
        verbs = parser.add_subparsers(dest="verb", required=True)
        build, run = verbs.add_parser("build"), verbs.add_parser("run")
        for options in (("-t",), ("--build-arg",), ("context",)):
            build.add_argument(*options)
        run.add_argument("--rm", action="store_true")
        run.add_argument("-v")
        run.add_argument("image")
        run.add_argument("arguments", nargs=argparse.REMAINDER)
        asked = parser.parse_args(call.arguments)

        text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        if asked.verb == "build":
            name, _, value = asked.build_arg.partition("=")
            assert f"\nARG {name}=" in text
            assert value in PROJECT["optional-dependencies"]
            return Reply()
        mounted, _, place = asked.v.rpartition(":")
        assert f"\nWORKDIR {place}\n" in text
        assert 'ENTRYPOINT ["racdeploy"]' in text
        planned = ["--dry-run"] * _begins(self._planned, "docker", call)
        return self.racdeploy(Call(asked.arguments + planned, Path(mounted), call.variables))

    def make(self, call: Call) -> Reply:
        """Run or print the commands of a target, where .venv is set up already."""
        assert (call.folder / "Makefile").is_file(), "there is no Makefile here"
        venv = call.folder / ".venv"
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        shutil.copy(_find("racdeploy", call), venv / "bin" / "racdeploy")
        for stamp in (".python", ".base", ".dev"):
            (venv / stamp).touch()
        plan = ["--dry-run"] * _begins(self._planned, "make", call)
        return Reply(instead=[_find("make", call, real=True), *plan, *call.arguments])

    def _start(self, port: str, ours: Iterable[object], call: Call) -> Reply:
        """Start a server in place of the one before it; return when it answers."""
        if before := self._servers.pop(port, None):
            before.kill()
            before.wait()
        server = self._servers[port] = subprocess.Popen(
            list(map(str, ours)),
            cwd=call.folder,
            env=environment(**call.variables, PYTHONWARNINGS="ignore"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: _answers(self.ports[port]), f"{ours} to answer", server)
        return Reply()


def install(call: Call) -> Reply:
    """Read what pip or pipx would install, and whether this project has the extras."""
    options, wanted = create_command("install").parse_args(call.arguments[1:])
    assert call.arguments[0] == "install"
    assert not options.editables
    for each in wanted:
        own = re.fullmatch(r"\.(\[.*\])?", each)
        requirement = Requirement(f"racdeploy{own[1] or ''}" if own else each)
        if requirement.name == "racdeploy":
            assert requirement.extras <= PROJECT["optional-dependencies"].keys(), each
            assert own or requirement.url == f"git+{REPOSITORY}", each
            assert not own or (call.folder / "pyproject.toml").is_file(), "not in a clone"
    return Reply()


def install_scripts(call: Call) -> Reply:
    """Make the folders of npm packages, those of what they need among them."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("verb", choices=["install"])
    parser.add_argument("--ignore-scripts", action="store_true", required=True)
    parser.add_argument("--prefix", type=Path, required=True)
    parser.add_argument("packages", nargs="+")
    asked = parser.parse_args(call.arguments)
    for package in [*asked.packages, "onnxruntime-web@1"]:
        name = package.rpartition("@")[0]
        (call.folder / asked.prefix / "node_modules" / name).mkdir(parents=True)
    return Reply()


def install_lm_eval(call: Call) -> Reply:
    """Check that the harness is the version that racdeploy reads; the stand-in is there already."""
    (package,) = create_command("install").parse_args(call.arguments[1:])[1]
    asked = Requirement(package)
    assert str(asked.specifier) == f"=={VERSIONS[asked.name]}"
    return Reply()


def _begins(beginnings: Iterable[str], program: str, call: Call) -> bool:
    """Return whether a command is one of those that begin so."""
    line = " ".join([program, *call.arguments, ""])
    return any(line.startswith(each) for each in beginnings)


def _read_arguments(call: Call) -> Reply:
    """Run a script until it has read its arguments, in this process, which has torch already."""
    parse = argparse.ArgumentParser.parse_args

    def read_and_stop(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        sys.exit(0)

    is_module = call.arguments[0] == "-m"
    arguments = call.arguments[is_module:]
    printed = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", read_and_stop),
        mock.patch.object(sys, "argv", arguments),
        contextlib.chdir(call.folder),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        # Another test of this process may have imported the module.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            (runpy.run_module if is_module else runpy.run_path)(arguments[0], run_name="__main__")
        except SystemExit as end:
            return Reply(int(end.code or 0), err=printed.getvalue())
    raise AssertionError(f"{arguments[0]} reads no arguments")


def _make_environment(call: Call) -> Reply:
    """Make an environment with the stand-in of lm-eval, one task of it, and its own pip."""
    (name,) = call.arguments[2:]
    python = install_harness(call.folder / name)
    shutil.copy(_find("harness-pip", call), python.parent / "pip")

    (package,) = (call.folder / name).glob("lib/python*/site-packages/lm_eval")
    (package / f"{HARNESS_TASK}.yaml").touch()
    rows = [
        {"question": f"What is {each} times 34?", "answer": str(each * 34)} for each in (12, 21)
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (package / "questions.jsonl").write_text(lines, encoding="utf-8")
    return Reply()


def _find(program: str, call: Call, *, real: bool = False) -> str:
    """Return the path of a stand-in, or that of the program itself."""
    ours, _, others = call.variables["PATH"].partition(os.pathsep)
    found = shutil.which(program, path=others if real else ours)
    assert found, f"{program} is not on the PATH"
    return found


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

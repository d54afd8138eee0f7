"""Does each extra install alone, and answer, in an environment that has nothing else?

    python -m benchmarks.clean_installs --index build/index --onnx build/onnx/model.onnx \
        --out build/clean --python python3.11 …

``--index`` is a folder with the wheels of racdeploy and, where the package index has none that
fits, of racdeploy-kernels and llama-cpp-python. Everything else comes from the package index that
the tool is set up for. No compiler is found. Prints a row for each interpreter, tool and extra:
processor seconds of the installation, size of the environment, and processor seconds of its first
answer: to a question where the extra has an engine, of a pruning or an ONNX export where it brings
torch, else the versions of the packages that it brings, once they are imported.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

QUESTION = (
    "Ann has 45 apples. Ann buys 38 more. Ann gives away 26. Ann finds 12 more. "
    "How many apples does Ann have now?"
)
TOOLS = ("pip", "uv", "pipx")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
PRUNING = "prune tiny-reasoner --method magnitude --sparsity 0.5 --trace-prompts 4 --threads 1"
IMPORTING = """
import sys
from importlib import import_module
from racdeploy.extras import PACKAGES, installed_version
for module, package in PACKAGES.items():
    if package.extra == sys.argv[1]:
        import_module(module)
        print(package.name, installed_version(package.name))
"""


@dataclass(frozen=True)
class Clean:
    """An environment that is made, used once and removed."""

    tool: str
    python: str
    extra: str
    folder: Path
    index: Path

    @property
    def requirement(self) -> str:
        """What is installed."""
        (wheel,) = self.index.glob("racdeploy-*.whl")
        return f"racdeploy[{self.extra}]=={wheel.name.split('-')[1]}".replace("[]", "")

    @property
    def programs(self) -> Path:
        """Folder of the environment's programs."""
        inside = "home/venvs/racdeploy" if self.tool == "pipx" else "env"
        return self.folder / inside / "bin"

    @property
    def variables(self) -> dict[str, str]:
        """Variables of all programs: caches of their own, no Hub, no compiler."""
        own = {"XDG_CACHE_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        pipx = {name: str(self.folder / "home") for name in ("PIPX_HOME", "PIPX_BIN_DIR")}
        return own | pipx | NO_COMPILER

    def install(self) -> None:
        """Install racdeploy with the extra."""
        wanted = ("--find-links", str(self.index), self.requirement)
        if self.tool == "pipx":
            links = f"--pip-args=--find-links {self.index}"
            self._run("pipx", "install", "--quiet", "--python", self.python, links, wanted[-1])
        elif self.tool == "uv":
            self._run("uv", "venv", "--quiet", "--python", self.python, str(self.folder / "env"))
            found = ("--python", str(self.programs / "python"))
            self._run("uv", "pip", "install", "--quiet", *found, *_list_uv_links(), *wanted)
        else:
            self._run(self.python, "-m", "venv", str(self.folder / "env"))
            self._run(str(self.programs / "pip"), "install", "--quiet", *wanted)

    def answer(self, onnx: Path) -> str:
        """Return the environment's answer, or the versions of what its extra brings."""
        racdeploy = str(self.programs / "racdeploy")
        model = self.folder / "model.gguf"
        extras = set(self.extra.split(","))

        if extras & {"onnx", "optimum", "all"}:
            exported = str(self.folder / "model.onnx")
            self._run(racdeploy, "export", "tiny-reasoner", "--target", "onnx", "--out", exported)
        if extras & {"", "llamacpp", "all"}:
            self._run(racdeploy, "export", "tiny-reasoner", "--out", str(model))
        if not self.extra:
            return self._run(racdeploy, "inspect", str(model), "--summary").splitlines()[-1]
        if extras & {"llamacpp", "all", "ort", "onnx", "optimum"}:
            asked = model if model.is_file() else onnx
            return self._run(racdeploy, "run", str(asked), QUESTION, "--threads", "1").strip()
        if extras == {"prune"}:
            return Path(self._run(racdeploy, *PRUNING.split()).strip()).name

        versions = self._run(str(self.programs / "python"), "-c", IMPORTING, self.extra)
        return ", ".join(versions.splitlines())

    def _run(self, *command: str) -> str:
        environment = {**os.environ, **self.variables}
        paths = {"PIP_CACHE_DIR": _pip_cache(), "UV_CACHE_DIR": str(self.index.parent / "uv-cache")}
        done = subprocess.run(
            command, env=environment | paths, cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])}: {(done.stderr or done.stdout)[-400:]}")
        return done.stdout


def main() -> None:
    """Install, answer and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument(
        "--onnx",
        type=Path,
        required=True,
        help="Exported tiny-reasoner, with its tokenizer.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--extras", nargs="*", default=["", "llamacpp", "ort", "all"])
    arguments = parser.parse_args()

    print("| Python | tool | extra | install, s | MB | first answer, s | |")
    print("|---|---|---|---|---|---|---|")
    for python in arguments.python:
        for tool in arguments.tools:
            for extra in arguments.extras:
                folder = arguments.out.resolve() / "environment"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                clean = Clean(tool, python, extra, folder, arguments.index.resolve())
                print(_measure(clean, arguments.onnx.resolve()), flush=True)
                shutil.rmtree(folder)


def _measure(clean: Clean, onnx: Path) -> str:
    """Return the row of an environment; what failed is in its last cell."""
    version = subprocess.run([clean.python, "-V"], capture_output=True, text=True).stdout.split()[1]
    head = f"| {version} | {clean.tool} | {clean.extra or 'none'} |"
    start_s = _cpu_seconds()
    try:
        clean.install()
        installed_s = _cpu_seconds()
        size = _count_bytes(clean.programs.parent) / 1e6
        said = clean.answer(onnx)
    except RuntimeError as error:
        return f"{head} | | | {' '.join(str(error).split()).replace('|', '/')} |"
    install_s, answer_s = installed_s - start_s, _cpu_seconds() - installed_s
    return f"{head} {install_s:.1f} | {size:.0f} | {answer_s:.1f} | {said} |"


def _cpu_seconds() -> float:
    """Return the processor time of all programs that have ended: others may use this machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _count_bytes(folder: Path) -> int:
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


def _list_uv_links() -> list[str]:
    """Return pip's other folders of wheels, of which uv does not know."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    folders = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return [part for folder in folders for part in ("--find-links", folder)]


def _pip_cache() -> str:
    asked = [sys.executable, "-m", "pip", "cache", "dir"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()

"""Does ``racdeploy compare`` judge files that racdeploy did not make? Good ones pass, spoiled ones
fail by the check that names the fault.

A model, by default the embedded one, converted by llama.cpp's own converter and quantizer, by
onnxruntime-genai's builder and by torch's exporter (optimum); the reference is the F16 file. Each
fault is one that a publisher makes. Every command is a process of its own; files and rows that are
there are kept, so that an interrupted run goes on. It needs ``racdeploy[test,optimum]``.

    python benchmarks/foreign_files.py --work foreign
    python benchmarks/foreign_files.py --work foreign-smol --model FOLDER --pre-tokenizer "" \
        --tasks word_problem gcd comparison
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from racdeploy.models.sources import resolve_model
from tests.support.llama_converter import Job, convert
from tests.support.llama_quantize import quantize
from tests.support.spoiled_gguf import rewrite, set_number, spoil

GOOD = ("q8_0", "q4_k_m", "q4_0", "genai", "genai_int4", "optimum")
EXPECTED = {
    "eos": "tokens",
    "template": "template",
    "zeroed": "logits",
    "zeroed_q4_k_m": "accuracy",  # the logits of 4 bits may differ by as much
    "rope_10": "logits",
    "rope_0.1": "logits",
    "merge": "tokens",
    "pre_tokenizer": "tokens",
    "endless": "thinking",
    "tags": "template",
    "bos": "template",
    "tq1_0": "accuracy",
    "genai_eos": "tokens",
    "genai_template": "template",
    "genai_merge": "tokens",
    "no_template": "no-template-in-file",
}
"""The check, or the error of a refusal, that each fault must show; others may fail as well."""
MEASURED = ("q2_k", "q2_k_pure")  # whether answers are lost is the question
BASE_END = "<|endoftext|>"  # of a base model


@dataclass(frozen=True)
class Row:
    """One candidate: what the command found, and how long it took."""

    name: str
    code: int
    verdict: str
    failed: tuple[str, ...]
    right: str
    prompts: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def is_as_expected(self) -> bool:
        """Whether a good file passed, and a fault was named by its check."""
        if self.name in GOOD:
            return self.code == 0
        return self.name in MEASURED or EXPECTED[self.name] in self.failed


def main() -> None:
    """Make the files, compare each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="tiny-reasoner", help="Hugging Face folder")
    parser.add_argument(
        "--pre-tokenizer",
        default="qwen2",
        help="name of the model's; empty: the converter knows the vocabulary, as a tiny one is not",
    )
    parser.add_argument("--tasks", nargs="*", default=(), help="default: every procedural one")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("names", nargs="*", help="candidates; default: all")
    arguments = parser.parse_args()
    work, threads = arguments.work.resolve(), arguments.threads
    (work / "rows").mkdir(parents=True, exist_ok=True)
    if not (work / "f16.gguf").is_file():
        (work / "model").unlink(missing_ok=True)
        (work / "model").symlink_to(resolve_model(arguments.model).folder.resolve())
        partial = work / "partial-f16.gguf"
        convert_to_f16(work, partial, arguments.pre_tokenizer)
        partial.rename(work / "f16.gguf")

    if not (work / "reference" / "reference.json").is_file():
        asked = ["--prompts", arguments.prompts, "--max-new-tokens", 512]
        for task in arguments.tasks:
            asked += ["--tasks", task]
        run("record", work / "f16.gguf", "--out", work / "reference", *asked, threads, work)

    rows = []
    for name in arguments.names or (*GOOD, *MEASURED, *EXPECTED):
        file = work / "rows" / f"{name}.json"
        if not file.is_file():
            row = compare(name, make_file(work, name), work, threads)
            file.write_text(json.dumps(asdict(row)), encoding="utf-8")
        known = json.loads(file.read_text(encoding="utf-8"))
        rows.append(Row(**{**known, "failed": tuple(known["failed"])}))
    print_table(rows)
    if wrong := [row.name for row in rows if not row.is_as_expected]:
        raise SystemExit(f"not as expected: {', '.join(wrong)}")


def compare(name: str, file: Path, work: Path, threads: int) -> Row:
    """Compare one candidate with the reference, as a user does."""
    start = time.monotonic()
    code, found = run("compare", file, "--against", work / "reference", "--json", threads, work)
    seconds = round(time.monotonic() - start, 1)
    if isinstance(found, dict):
        return Row(name, code, "refused", (found["code"],), "", 0, seconds)

    (report,) = found
    candidate = report["arms"][1]
    failed = tuple(c["name"] for c in report["checks"] if c["verdict"] == "fail")
    right = f"{candidate['correct']} of {candidate['prompts']}"
    counted = (candidate["prompts"], seconds, tuple(report["notes"]))
    return Row(name, code, report["verdict"], failed, right, *counted)


def run(verb: str, *arguments: Any) -> tuple[int, Any]:
    """Run a command; the last two arguments are its threads and its work folder."""
    *given, threads, work = map(str, arguments)
    command = [sys.executable, "-m", "racdeploy", verb, *given, "--threads", threads]
    done = subprocess.run(
        [*command, "--work", str(Path(work) / "work")], stdout=subprocess.PIPE, text=True
    )
    is_json = "--json" in given
    if done.returncode and not is_json:
        raise SystemExit(f"{verb} ended with exit code {done.returncode}")
    return done.returncode, json.loads(done.stdout) if is_json else None


def print_table(rows: list[Row]) -> None:
    """Print Markdown: one row for each candidate."""
    print(
        "| candidate | verdict | failed checks | right | n | seconds |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        mark = "" if row.is_as_expected else " (not as expected)"
        cells = (row.name, row.verdict + mark, ", ".join(row.failed), row.right or "–")
        print(f"| {' | '.join(cells)} | {row.prompts} | {row.seconds:.0f} |")


def make_file(work: Path, name: str) -> Path:
    """Return a candidate's file or folder, made once: it gets its name when it is whole."""
    suffix = "" if name.startswith(("genai", "optimum")) else ".gguf"
    out = work / f"{name}{suffix}"
    if out.exists():
        return out

    partial = work / f"partial-{name}{suffix}"
    for remove in (shutil.rmtree, Path.unlink):
        if partial.is_dir() == (remove is shutil.rmtree) and partial.exists():
            remove(partial)
    if name.startswith("genai_") and name != "genai_int4":
        shutil.copytree(make_file(work, "genai"), partial)
        _FOLDER_FAULTS[name](partial)
    else:
        _make(work, name, partial)
    partial.rename(out)
    return out


def _make(work: Path, name: str, out: Path) -> None:
    source = str(work / "model")
    f16 = work / "f16.gguf"
    if name == "pre_tokenizer":
        convert_to_f16(work, out, "gpt-2")
    elif name.startswith("genai"):
        precision = "int4" if name == "genai_int4" else "fp32"
        builder = ("-m", "onnxruntime_genai.models.builder", "-i", source, "-p", precision)
        _call(sys.executable, *builder, "-e", "cpu", "-o", str(out))
    elif name == "optimum":
        tool = Path(sys.executable).with_name("optimum-cli")
        task = ("--task", "text-generation-with-past")
        _call(str(tool), "export", "onnx", "--model", source, *task, str(out))
    elif name in _RENAMED:
        _RENAMED[name](f16, out)
    elif name.startswith("zeroed_"):
        quantize(make_file(work, "zeroed"), out, name.removeprefix("zeroed_").upper())
    elif name in EXPECTED and name != "tq1_0":
        spoil(name, f16, out)
    else:
        pure = name.endswith("_pure")
        quantize(f16, out, name.removesuffix("_pure").upper(), pure=pure)


def convert_to_f16(work: Path, out: Path, pre_tokenizer: str) -> None:
    """Convert the model by llama.cpp's converter."""
    convert([Job(str((work / "model").resolve()), str(out), "f16", pre_tokenizer=pre_tokenizer)])


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr[-2000:]}")


_RENAMED: dict[str, Callable[[Path, Path], object]] = {
    "rope_10": lambda s, f: set_number(s, f, "rope.freq_base", lambda base: 10 * base),
    "rope_0.1": lambda s, f: set_number(s, f, "rope.freq_base", lambda base: base / 10),
    "no_template": lambda s, f: rewrite(
        s, f, lambda k, v: "" if k == "tokenizer.chat_template" else v
    ),
}


def _edit_json(file: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def _stop_at_base_end(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end_id = tokenizer.token_to_id(BASE_END)
    _edit_json(folder / "genai_config.json", lambda c: c["model"].update(eos_token_id=end_id))


def _drop_tag(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("<think>", ""), encoding="utf-8")


_FOLDER_FAULTS: dict[str, Callable[[Path], object]] = {
    "genai_eos": _stop_at_base_end,
    "genai_template": _drop_tag,
    "genai_merge": lambda folder: _edit_json(
        folder / "tokenizer.json", lambda c: c["model"]["merges"].pop(20)
    ),
}

if __name__ == "__main__":
    main()

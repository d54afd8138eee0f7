"""Write one small file of every kind as the racdeploy at hand writes it.

``python -m tests.support.release_files VERSION`` was run once for each release: what it wrote is in
tests/references/release-VERSION and is never changed, and tests/test_release_files.py opens it.
The reports for people, which no racdeploy reads again, are left out.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

from racdeploy import extras
from tests.support.commands import Outcome, racdeploy
from tests.support.sample_tuning import build_tuning
from tests.support.tiny_models import make_checkpoint

ROOT = Path(__file__).parents[1] / "references"
RECIPE = """\
schema_version = 1
[traces]
count = 16
max_new_tokens = 24
batch_size = 8
[calibration]
keep_truncated = true
[verify]
count = 6
max_new_tokens = 24
context_tokens = 128
logit_traces = 1
"""
FOR_PEOPLE = ("report.html", "report.md", "junit.xml", "README.md")


def write_release_files(folder: Path, scratch: Path) -> None:
    """Write recipe, packed bundle, reference, search and conversation into an empty folder."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")

    model = make_checkpoint(scratch / "model", "qwen3", intermediate_size=64)
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(40)]
    questions = scratch / "problems.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    bundle, task = folder / "bundle", f"jsonl:{questions}"
    options = ("--recipe", folder / "recipe.toml", "--work", scratch / "work", "--threads", 1)
    _run("build", model, "--tasks", task, *options, "--packing", "bitmask", "--out", bundle)
    for name in FOR_PEOPLE:
        (bundle / name).unlink(missing_ok=True)

    (packed,) = bundle.glob("*.racgguf")
    plain = scratch / "plain.gguf"
    _run("unpack", packed, "--out", plain)
    limits = ("--max-new-tokens", 24, "--context-tokens", 128, "--threads", 1)
    _run("record", plain, "--tasks", task, "--prompts", 4, *limits, "--out", folder / "reference")

    (folder / "tune.json").write_text(build_tuning().model_dump_json(), encoding="utf-8")
    _converse(bundle, folder / "conversation.json")


def _run(*arguments: object) -> Outcome:
    outcome = racdeploy(*arguments)
    assert outcome.code in (0, 3), outcome.err  # a random model answers nothing
    return outcome


def _converse(bundle: Path, file: Path) -> None:
    import racdeploy
    from racdeploy.runtime.conversation import Conversation

    with racdeploy.load(bundle) as model:
        talk = Conversation(model, "Be brief.")
        talk.ask("What is 2 plus 3?", max_new_tokens=8)
        talk.save(file)


def main(version: str) -> None:
    """Write the files of a version that may not be tagged yet."""
    find_version = extras.version
    target = ROOT / f"release-{version}"
    shutil.rmtree(target, ignore_errors=True)

    def name_version(package: str) -> str:
        return version if package == "racdeploy" else find_version(package)

    named = mock.patch.object(extras, "version", name_version)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch), named:
        write_release_files(target, Path())


if __name__ == "__main__":
    main(sys.argv[1])

"""Every code block of README and the guides runs, pasted as it stands, in the order of its page.

What differs from a reader's machine is listed here: WORDS that are replaced, THINGS that the reader
has already, commands that are AS_PLAN or PARSED, those NOT_RUN, and the programs of
tests/support/stand_in_programs.py. Builds that run ask FEWER prompts.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from racdeploy.bundles.bench import find_dense_artifact
from racdeploy.errors import RacdeployError
from racdeploy.recipe import Recipe
from racdeploy.results.tuning import Tuning
from tests.support.commands import environment, racdeploy
from tests.support.hub_server import WRITES, hub_server
from tests.support.pasting import Block, Call, Terminal, read_blocks
from tests.support.real_server import write_model
from tests.support.sample_tuning import build_tuning
from tests.support.stand_in_programs import REPOSITORY, ROOT, StandIns
from tests.support.tiny_models import make_checkpoint

FILES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
PAGES = {file.relative_to(ROOT).as_posix(): file for file in sorted(FILES)}
BLOCKS = {page: read_blocks(file.read_text(encoding="utf-8")) for page, file in PAGES.items()}

BUILD = "a build or a search takes minutes"
README = "the test of README.md runs it"
AS_PLAN = {
    "README.md": {
        "racdeploy build deepseek-ai/": BUILD,
        "racdeploy build ./my-model ": BUILD,
        "racdeploy tune ": BUILD,
        "make test": "this test is one of them",
        "make lint": "it has its own job",
    },
    "docs/choosing.md": {"racdeploy build MODEL ": BUILD, "racdeploy tune MODEL ": BUILD},
    "docs/cuts.md": {"racdeploy build ./my-model ": BUILD},
    "docs/getting-started.md": {"make demo": README, "docker run ": BUILD},
    "docs/gguf.md": {"racdeploy build ./my-model ": BUILD},
    "docs/index.md": {"make demo": README},
    "docs/onnx.md": {"racdeploy build --target ": BUILD},
    "docs/pruning.md": {"racdeploy build ./my-model ": BUILD},
    "docs/recovery.md": {"racdeploy build ./my-model ": BUILD},
    "docs/tasks.md": {"racdeploy build ": BUILD},
    "docs/tune.md": {"racdeploy tune ": BUILD, "racdeploy build ./my-other-model ": BUILD},
    "docs/thinking.md": {"racdeploy build ./my-model ": BUILD},
    "docs/verification.md": {"racdeploy build ./my-model ": BUILD},
    "examples/README.md": {"racdeploy build --recipe ": BUILD},
}
"""Beginnings of commands that run with ``--dry-run``, and why."""
PARSED = {
    "examples/gsm_reasoner/README.md": {
        "python examples/gsm_reasoner/teach.py": "an hour; test_gsm_reasoner.py draws",
    },
    "examples/reproduce/README.md": {
        "python examples/reproduce/reproduce.py": "hours; test_reproduce.py plans and builds",
    },
    "examples/smol_reasoner/README.md": {
        "python examples/smol_reasoner/finetune.py": "56 minutes; test_smol_reasoner.py trains",
        "python -m benchmarks.calibration": "hours",
    },
    "examples/tiny_reasoner/README.md": {"python examples/tiny_reasoner/train.py": "an hour"},
}
"""Beginnings of commands of which the arguments are read, and nothing else."""
NOT_RUN = {
    "docs/publish.md": {
        "racdeploy sign bundle --keyless": "sigstore's servers, and a workflow or a person",
        "racdeploy verify bundle --issuer": "a signature of the line before",
    },
    "docs/tune.md": {"racdeploy bench --profile": "a minute; test_tune.py measures"},
}
"""Beginnings of commands that are left out; tests/test_command_lines.py parses them."""
WORDS = {
    "README.md": {
        'target="gguf"': (
            'recipe=racdeploy.Recipe.read(settings={"structure.keep": {}, "export.quant": "q8_0", '
            '"traces.count": 16, "verify.count": 64, "verify.logit_traces": 2})'
        )
    },
    "docs/compare.md": {"jsonl:problems.jsonl": "word_problem", "--prompts 300": "--prompts 96"},
    "docs/cuts.md": {"vocabulary=8192": "vocabulary=400"},
    "docs/packing.md": {"NAME.racgguf": "*.racgguf"},
    "docs/run.md": {"--host 0.0.0.0": "--host 127.0.0.1"},
    "docs/tasks.md": {
        "--harness-limit 200": "--harness-limit 2 --exit-zero",
        "hub:gsm8k": "gsm8k:test.jsonl",
        "hub:aime25": "aime25:contest.jsonl",
        "hub:math500": "math500:training.jsonl",
    },
}
"""Words of a page, and what a test has in their place; so are the ports of servers."""
SERVED = {"docs/verification.md": "bundle"}
"""Pages whose reader has a server at port 8000, and the bundle that it serves."""
OURS = ["benchmarks", "examples"]
"""What is in the folder where a page is read, of this project; a clone has its first files too."""
DEEPSEEK = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
THINGS = {
    "README.md": ["my-model", DEEPSEEK, "problems.jsonl"],
    "docs/choosing.md": ["MODEL"],
    "docs/ci.md": ["bundle"],
    "docs/compare.md": ["f16.gguf", "q4_k_m.gguf", "q3_k_m.gguf", "new.gguf"],
    "docs/cuts.md": ["my-model", "notes.txt", "my-bundle"],
    "docs/families.md": ["my-model"],
    "docs/getting-started.md": ["Qwen/Qwen3-0.6B", "build/tiny-reasoner-bundle"],
    "docs/gguf.md": ["my-model"],
    "docs/onnx.md": ["build/browser-bundle"],
    "docs/packing.md": ["my-model"],
    "docs/pruning.md": ["my-model"],
    "docs/publish.md": ["bundle", "key.pem", "key.pub"],
    "docs/recovery.md": ["my-model", "PRUNED"],
    "docs/run.md": ["bundle", "questions.txt", "dense.gguf"],
    "docs/tasks.md": [
        *("my-model", DEEPSEEK, "bundle", "model.gguf"),
        *("problems.jsonl", "test.jsonl", "contest.jsonl", "training.jsonl"),
    ],
    "docs/thinking.md": ["my-model"],
    "docs/tune.md": ["my-model", "my-other-model", "tuned", "mine.toml"],
    "docs/verification.md": ["my-model", "bundle", "racdeploy-gate.toml"],
    "examples/README.md": ["build/quick"],
    "examples/fastapi/README.md": ["bundle"],
}
"""What the reader of a page has before it, or from a command that is AS_PLAN."""
FEWER_EMBEDDED = [
    *("--keep", "ffn=1", "--quant", "q8_0", "--trace-prompts", "16", "--prompts", "64"),
    *("--set", "verify.logit_traces=2"),
]
FEWER = [
    *("--threads", "1", "--set", "traces.count=40", "--set", "traces.max_new_tokens=16"),
    *("--set", "calibration.keep_truncated=true"),
    *("--set", "verify.count=8", "--set", "verify.max_new_tokens=16"),
    *("--set", "verify.context_tokens=128", "--set", "verify.logit_traces=2"),
    *("--set", 'gate.inconclusive="pass"'),
]
"""Of the embedded model, and of the stand-in for others."""
QUESTION = "What is 12 times 34?\n"


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each: models, and a bundle of the embedded one with its work folder."""
    folder = tmp_path_factory.mktemp("things")
    # 5/9 and 3/4 of the channels are multiples of 32.
    make_checkpoint(
        folder / "model", "llama", intermediate_size=1152, max_position_embeddings=32768
    )
    write_model(folder / "embedded")
    arguments = ["build", *FEWER_EMBEDDED, "--work", folder / "work", "--out", folder / "bundle"]
    outcome = racdeploy(*arguments)
    assert outcome.code == 0, outcome.out + outcome.err

    pruned = racdeploy("prune", folder / "model", *FEWER, "--work", folder / "work")
    assert pruned.code == 0, pruned.err
    (folder / "PRUNED").symlink_to(pruned.out.strip())
    for command in (
        "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        "openssl ec -in key.pem -pubout -out key.pub",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


def _provide(name: str, things: Path, folder: Path) -> None:
    """Put what a reader has into a folder."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    match name.rpartition("/")[2]:
        case "my-model" | "my-other-model" | "MODEL" | "Qwen3-0.6B":
            target.symlink_to(things / "model")
        case "DeepSeek-R1-Distill-Qwen-1.5B":
            target.symlink_to(things / "embedded")
        case "bundle" | "my-bundle" | "browser-bundle" | "tiny-reasoner-bundle" | "quick":
            shutil.copytree(things / "bundle", target)
        case "dense.gguf":
            target.symlink_to(find_dense_artifact(things / "bundle", things / "work"))
        case "model.gguf" | "f16.gguf" | "q4_k_m.gguf" | "q3_k_m.gguf" | "new.gguf":
            # A link would be the same candidate a second time.
            shutil.copy(things / "embedded" / "model.gguf", target)
        case "mine.toml":
            shutil.copy(ROOT / "targets" / "gguf.toml", target)
        case "PRUNED" | "key.pem" | "key.pub":
            target.symlink_to((things / name).resolve())
        case "racdeploy-gate.toml":
            target.symlink_to(ROOT / "examples" / "ci" / name)
        case "questions.txt" | "notes.txt":
            target.write_text(QUESTION * 2, encoding="utf-8")
        case "tuned":
            target.mkdir()
            tuning: Tuning = build_tuning()
            (target / "tune.json").write_text(tuning.model_dump_json(), encoding="utf-8")
            (target / "recipe.toml").write_text("[prune]\nsparsity = 0.5\n", encoding="utf-8")
        case "problems.jsonl":
            _write_rows(target, "question", "{}")
        case "test.jsonl":
            _write_rows(target, "question", "It is so.\n#### {}")
        case "contest.jsonl":
            _write_rows(target, "problem", "{}")
        case "training.jsonl":
            _write_rows(target, "problem", "{}", first=900)
        case _:
            raise AssertionError(f"no test has {name}")


def _write_rows(file: Path, question: str, answer: str, first: int = 0) -> None:
    rows = [
        {question: f"What is {each} plus 1?", "answer": answer.format(each + 1), "solution": "so"}
        for each in range(first, first + 900)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


class Page:
    """A page that is read from its top: the terminal, and the names that its Python has."""

    def __init__(self, name: str, terminal: Terminal, ports: Mapping[str, int]) -> None:
        self._name, self._terminal, self._ports = name, terminal, ports
        self._names: dict[str, Any] = {}
        self._printed = ""

    def run(self, block: Block) -> None:
        """Do with a block what a reader does with one of its language."""
        runners: dict[str, Callable[[str], None]] = {
            "sh": self._paste,
            "python": self._execute,
            "toml": self._read_recipe,
            "yaml": self._read_step,
            "": self._compare,
        }
        runners[block.language](self._replace(block.text))

    def _replace(self, text: str) -> str:
        for word, ours in WORDS.get(self._name, {}).items():
            text = text.replace(word, ours)
        for port, free in self._ports.items():
            text = re.sub(rf"(127\.0\.0\.1:|--port ){port}\b", rf"\g<1>{free}", text)
        return text

    def _paste(self, text: str) -> None:
        for line in Block("sh", text, 0).commands():
            if any(line.startswith(each) for each in NOT_RUN.get(self._name, {})):
                text = text.replace("\\\n    ", "").replace(line, ":")
        self._printed = self._terminal.paste(text, QUESTION)

    def _execute(self, text: str) -> None:
        with contextlib.chdir(self._terminal.folder), contextlib.redirect_stdout(io.StringIO()):
            exec(compile(text, self._name, "exec"), self._names)

    def _read_recipe(self, text: str) -> None:
        file = self._terminal.folder / "part.toml"
        file.write_text(text, encoding="utf-8")
        Recipe.combine(file, {})

    def _read_step(self, text: str) -> None:
        action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
        (step,) = yaml.safe_load(text)
        assert step["uses"].partition("@")[0] == REPOSITORY.partition("github.com/")[2]
        assert set(step["with"]) <= set(action["inputs"])

    def _compare(self, text: str) -> None:
        """A block without a language is what the one before it printed, but for an ellipsis."""
        pattern = ".*".join(map(re.escape, re.split(" ?…", text.rstrip("\n"))))
        assert re.search(pattern, self._printed), self._printed


@contextlib.contextmanager
def _open(name: str, things: Path, state: Path) -> Iterator[Page]:
    """Open a page in a folder with what its reader has; end its servers."""

    def furnish(folder: Path) -> None:
        folder.mkdir()
        for entry in OURS:
            (folder / entry).symlink_to(ROOT / entry)
        for thing in THINGS.get(name, []):
            _provide(thing, things, folder)

    folder = state / "page"
    furnish(folder)
    fewer, parsed = (FEWER_EMBEDDED, FEWER), PARSED.get(name, {})
    stand_ins = StandIns(AS_PLAN.get(name, {}), fewer, parsed, furnish)
    with hub_server() as hub, stand_ins.running(), pytest.MonkeyPatch.context() as patch:
        variables = {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": WRITES,
            "HF_HOME": str(state / "hub"),
            "XDG_CACHE_HOME": str(state / "cache"),
            "RACDEPLOY_WORK": str(things / "work"),
            "BROWSER": "true",
        }
        for variable, value in variables.items():
            patch.setenv(variable, value)
        programs = stand_ins.programs()
        with Terminal(state / "t", folder, programs, environment(**variables)) as terminal:
            if name in SERVED:
                (file,) = (folder / SERVED[name]).glob("*Q8_0.gguf")
                stand_ins.serve(file, Call([], folder, environment()))
            yield Page(name, terminal, stand_ins.ports)


@pytest.mark.parametrize("name", [page for page in PAGES if BLOCKS[page]])
def test_the_blocks_of_a_page_run(name: str, things: Path, tmp_path: Path) -> None:
    """From the first to the last, in one shell and one Python."""
    with _open(name, things, tmp_path) as page:
        for block in BLOCKS[name]:
            page.run(block)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("docs/families.md", "--json", "--jsn"),
        ("docs/index.md", "racdeploy/racdeploy", "racdeploy/racdeploi"),
        ("docs/gguf.md", "accept_token", "accept_tokens"),
        ("docs/ci.md", "gate: ", "gates: "),
        ("docs/run.md", "thinking_tokens, result", "thinking_token, result"),
        ("examples/fastapi/README.md", "{408}", "{409}"),
    ],
)
def test_a_wrong_block_does_not_run(
    name: str, right: str, wrong: str, things: Path, tmp_path: Path
) -> None:
    """A command, an address, a key, an input, a name and an output."""
    block = next(block for block in BLOCKS[name] if right in block.text)
    before = [] if block.language else BLOCKS[name][: BLOCKS[name].index(block)]
    with _open(name, things, tmp_path) as page:
        for each in before:
            page.run(each)
        with pytest.raises((AssertionError, AttributeError, RacdeployError)):
            page.run(replace(block, text=block.text.replace(right, wrong)))


def test_every_exception_is_needed() -> None:
    """What the tables name is in its page."""
    commands = {
        page: [command for block in blocks for command in block.commands()]
        for page, blocks in BLOCKS.items()
    }
    unused = [
        f"{page}: {beginning}"
        for table in (AS_PLAN, PARSED, NOT_RUN)
        for page, rows in table.items()
        for beginning in rows
        if not any(command.startswith(beginning) for command in commands[page])
    ]
    for page, words in WORDS.items():
        unused += [f"{page}: {word}" for word in words if word not in _join(page)]
    for page, names in THINGS.items():
        text = _join(page) + " ".join(WORDS.get(page, {}).values())
        unused += [f"{page}: {name}" for name in names if name not in text]
    assert unused == []


def _join(page: str) -> str:
    return "".join(block.text for block in BLOCKS[page])

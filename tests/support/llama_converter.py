"""llama.cpp's own converter, from the source package of the llama-cpp-python that is installed, in
a child process.

The source package is fetched once by pip, of the very version that the tests run, and the converter
with the gguf-py that belongs to it is unpacked under the user's cache. The child has this
interpreter's torch and transformers, and the unpacked gguf-py before the installed one. Nothing of
it is imported here.

Run as a script it is the child: it takes a list of jobs. A pre-tokenizer that llama.cpp knows by
the hash of the probe text's ids cannot be recognized for a tiny vocabulary, so its name is given
with the job; everything else the converter decides itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

_WANTED = ("/vendor/llama.cpp/conversion/", "/vendor/llama.cpp/gguf-py/gguf/")


@dataclass(frozen=True)
class Job:
    """One conversion.

    Args:
        folder: the checkpoint.
        out: the file to write.
        quant: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        pre_tokenizer: the name that the converter's table of hashes would give; empty asks the
            table.
        further: whether the model has a head that predicts further tokens.
    """

    folder: str
    out: str
    quant: str
    pre_tokenizer: str = ""
    further: bool = False


def convert(jobs: Sequence[Job]) -> None:
    """Run llama.cpp's converter on every job, in one child process."""
    source = fetch_source(_WANTED)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
        path = os.pathsep.join(map(str, (source / "gguf-py", source)))
        child = subprocess.run(
            [sys.executable, __file__, str(file)],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
    assert child.returncode == 0, (
        f"the converter failed ({child.returncode}): {child.stderr[-3000:]}"
    )


def fetch_source(wanted: Sequence[str], part: str = "") -> Path:
    """Return the unpacked ``vendor/llama.cpp``, fetched on the first use.

    Args:
        wanted: parts of the names of the files to unpack.
        part: what they are, for the name of their folder.
    """
    name = f"llama_cpp_python-{version('llama-cpp-python')}"
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "racdeploy" / "sources"
    )
    place = cache / f"{name}{part}"
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _fetch(name, Path(scratch), wanted)
            (Path(scratch) / name).rename(place)
    return place / "vendor" / "llama.cpp"


def _fetch(name: str, scratch: Path, wanted: Sequence[str]) -> None:
    requirement = name.replace("_", "-").replace("python-", "python==")
    command = [
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
        "--dest",
        str(scratch),
    ]
    subprocess.run([sys.executable, "-m", "pip", *command, requirement], check=True, timeout=600)
    with tarfile.open(scratch / f"{name}.tar.gz") as archive:
        for member in archive:
            if any(part in member.name for part in wanted) and member.isfile():
                archive.extract(member, scratch, filter="data")


def _main(jobs: list[dict[str, str]]) -> None:
    import gguf
    import torch
    import transformers
    from conversion import ModelBase, get_model_class
    from conversion.base import TextModel

    types: dict[str, Any] = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    # transformers 5 writes this class name for a tokenizer.json without a class of its own; 4.57
    # does not know it.
    transformers.TokenizersBackend = transformers.PreTrainedTokenizerFast
    # 4.57 does not know this one, and then the converter reads config.json itself. What 5 adds to
    # it, experts among them, makes another model of it.
    transformers.CONFIG_MAPPING._mapping.pop("nemotron_h", None)
    by_hash = TextModel.get_vocab_base_pre
    for job in jobs:
        folder, named = Path(job["folder"]), job["pre_tokenizer"]
        TextModel.get_vocab_base_pre = (
            (lambda self, tokenizer, named=named: named) if named else by_hash
        )
        (architecture,) = ModelBase.load_hparams(folder, False)["architectures"]
        kind = get_model_class(architecture)
        kind.no_mtp = not job["further"]
        with torch.inference_mode():
            kind(folder, types[job["quant"]], Path(job["out"])).write()


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

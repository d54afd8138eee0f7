"""One tiny random model, as each engine wants it, and the bundle round it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from safetensors.torch import load_file, save_file

from racdeploy.engines.backends.llamacpp import open_engine as open_llamacpp
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import gguf
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import ArtifactEntry, GenerationSettings, Manifest, TokenizerEntry
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from tests.support.completion_server import answering, models, serving
from tests.support.real_server import write_model
from tests.support.tiny_models import SPECIAL_TOKENS, make_checkpoint
from tests.support.tiny_onnx import APPENDING, tiny_onnx

CONTEXT_TOKENS = 256
EOS_ID = SPECIAL_TOKENS["<|im_end|>"]
OPEN_ID, CLOSE_ID = SPECIAL_TOKENS["<think>"], SPECIAL_TOKENS["</think>"]


def make_gguf(folder: Path) -> Path:
    """Write the tiny model in float32 GGUF; return the file."""
    checkpoint = Checkpoint(make_checkpoint(folder / "checkpoint", "qwen3"))
    gguf.export(checkpoint, folder / "model.gguf", quant="f32")
    return folder / "model.gguf"


@contextmanager
def serve_gguf(folder: Path) -> Iterator[str]:
    """Serve the tiny model's GGUF; yield the address."""
    settings = EngineSettings(CONTEXT_TOKENS, parallel=1, threads=1, cache_dtype="f32")
    with open_llamacpp(make_gguf(folder), settings) as engine:
        routes = {
            "v1/models": models("tiny", meta={"n_vocab": 512}),
            "v1/completions": answering(engine),
        }
        with serving(routes) as url:
            yield url


# How each engine of the contract gets its tiny model; an engine that is missing here fails a test.
# What stands behind a colon tells two kinds of artifact of one engine apart.
ARTIFACTS: dict[str, Callable[[Path], AbstractContextManager[Path | str]]] = {
    "llamacpp": lambda folder: nullcontext(make_gguf(folder)),
    "onnxruntime:genai": lambda folder: nullcontext(tiny_onnx() / "genai" / "model.onnx"),
    "onnxruntime:appending": lambda folder: nullcontext(tiny_onnx() / APPENDING / "model.onnx"),
    "server": serve_gguf,
    "transformers": lambda folder: nullcontext(make_checkpoint(folder / "checkpoint", "qwen3")),
}
# What an HTTP API does not offer; the contract holds these engines to saying so.
WITHOUT_LOGITS = WITHOUT_BUDGET = ANEW = frozenset({"server"})


def make_bundle(folder: Path) -> Path:
    """Write a whole bundle round the tiny model in GGUF; return its folder."""
    return write_bundle(
        make_gguf(folder).parent / "checkpoint", {"model.gguf": folder / "model.gguf"}, "llamacpp"
    )


def make_onnx_bundle(folder: Path) -> Path:
    """Write a whole bundle round the tiny model in ONNX, in ``folder``; return it."""
    shutil.copytree(tiny_onnx() / "checkpoint", folder / "checkpoint")
    files = {
        f"onnx/{name}": tiny_onnx() / "genai" / name for name in ("model.onnx", "model.onnx.data")
    }
    bundle = write_bundle(folder / "checkpoint", files, "onnxruntime")
    shutil.copy(folder / "checkpoint" / "config.json", bundle)

    manifest = Manifest.read(bundle)
    companions = {"config.json": file_sha256(bundle / "config.json")}
    listed = [entry.model_copy(update={"companions": companions}) for entry in manifest.artifacts]
    whole = manifest.model_copy(update={"artifacts": tuple(listed)})
    (bundle / "racdeploy.json").write_text(whole.model_dump_json(), encoding="utf-8")
    return bundle


def make_thinking_bundle(folder: Path, zeros: float = 0.0, quant: str = "f32") -> Path:
    """Write a whole bundle round the embedded model, which answers; return it.

    That share of the linears' smallest weights is zero.
    """
    checkpoint = write_model(folder / "checkpoint")
    if zeros or quant != "f32":
        _zero_smallest(checkpoint / "model.safetensors", zeros)
        gguf.export(Checkpoint(checkpoint), checkpoint / "model.gguf", quant=quant)
    bundle = write_bundle(checkpoint, {"model.gguf": checkpoint / "model.gguf"}, "llamacpp")

    manifest = Manifest.read(bundle)
    eos_ids = Checkpoint(checkpoint).eos_ids
    tokenizer = manifest.tokenizer.model_copy(update={"eos_ids": eos_ids})
    limits = {"max_new_tokens": 600, "max_thinking_tokens": None, "context_tokens": 1024}
    generation = manifest.generation.model_copy(update=limits)

    whole = manifest.model_copy(update={"tokenizer": tokenizer, "generation": generation})
    (bundle / "racdeploy.json").write_text(whole.model_dump_json(), encoding="utf-8")
    return bundle


def _zero_smallest(file: Path, share: float) -> None:
    weights = load_file(file)
    for name, weight_OI in weights.items():
        if name.endswith("_proj.weight"):
            size_OI = weight_OI.float().abs()
            weight_OI[size_OI <= size_OI.quantile(share)] = 0
    save_file(weights, file, metadata={"format": "pt"})


def write_bundle(checkpoint: Path, files: dict[str, Path], backend: str) -> Path:
    """Write a bundle beside a model folder; the first file is the one that the engine opens."""
    bundle = checkpoint.parent / "bundle"
    for name, source in files.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, bundle / name)
    names = [name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    for name in names:
        shutil.copy(checkpoint / name, bundle / name)
    hashes = {name: file_sha256(bundle / name) for name in files}
    main = next(iter(files))
    manifest = Manifest(
        racdeploy_version="0",
        base={"name": "tiny"},
        recipe={},
        traces={},
        pruning={},
        artifacts=(
            ArtifactEntry(
                path=main,
                format=Path(main).suffix.removeprefix("."),
                quant="f32",
                packing="plain",
                size_bytes=sum((bundle / name).stat().st_size for name in files),
                sha256=hashes[main],
                backend=backend,
                files=hashes,
            ),
        ),
        tokenizer=TokenizerEntry(
            files={name: file_sha256(bundle / name) for name in names},
            template_sha256="0",
            open_tag="<think>",
            close_tag="</think>",
            eos_ids=(EOS_ID,),
        ),
        generation=GenerationSettings(
            temperature=0.0,
            top_p=1.0,
            max_new_tokens=24,
            max_thinking_tokens=8,
            context_tokens=CONTEXT_TOKENS,
        ),
        verdict="none",
        headline={},
    )
    (bundle / "racdeploy.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return bundle

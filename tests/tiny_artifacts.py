"""One tiny random model, as each engine wants it, and the bundle round it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from racdeploy.artifacts import ArtifactEntry, GenerationSettings, Manifest, TokenizerEntry
from racdeploy.backends import EngineSettings
from racdeploy.backends.llamacpp import open_engine as open_llamacpp
from racdeploy.checkpoint import TOKENIZER_FILES, Checkpoint, file_sha256
from racdeploy.export import gguf
from tests.completion_server import answering, models, serving
from tests.tiny_models import SPECIAL_TOKENS, make_checkpoint

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
        routes = {"v1/models": models("tiny", meta={"n_vocab": 512}), "v1/completions": answering(engine)}
        with serving(routes) as url:
            yield url


# How each engine of the contract gets its tiny model; an engine that is missing here fails a test.
ARTIFACTS: dict[str, Callable[[Path], AbstractContextManager[Path | str]]] = {
    "llamacpp": lambda folder: nullcontext(make_gguf(folder)),
    "openai": serve_gguf,
    "transformers": lambda folder: nullcontext(make_checkpoint(folder / "checkpoint", "qwen3")),
}
# What an HTTP API does not offer; the contract holds these engines to saying so.
WITHOUT_LOGITS = WITHOUT_BUDGET = frozenset({"openai"})


def make_bundle(folder: Path) -> Path:
    """Write a whole bundle round the tiny model; return its folder."""
    model, bundle = make_gguf(folder), folder / "bundle"
    bundle.mkdir()
    shutil.move(model, bundle / "model.gguf")
    names = [name for name in TOKENIZER_FILES if (folder / "checkpoint" / name).is_file()]
    for name in names:
        shutil.copy(folder / "checkpoint" / name, bundle / name)
    artifact = partial(ArtifactEntry, path="model.gguf", format="gguf", quant="f32", packing="plain")
    size_bytes = (bundle / "model.gguf").stat().st_size
    manifest = Manifest(
        racdeploy_version="0",
        base={},
        recipe={},
        traces={},
        pruning={},
        artifacts=(artifact(size_bytes=size_bytes, sha256=file_sha256(bundle / "model.gguf"), backend="llamacpp"),),
        tokenizer=TokenizerEntry(
            files={name: file_sha256(bundle / name) for name in names},
            template_sha256="0",
            open_tag="<think>",
            close_tag="</think>",
            eos_ids=(EOS_ID,),
        ),
        generation=GenerationSettings(
            temperature=0.0, top_p=1.0, max_new_tokens=24, max_thinking_tokens=8, context_tokens=CONTEXT_TOKENS
        ),
        verdict="none",
        headline={},
    )
    (bundle / "racdeploy.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return bundle

"""What does a cut vocabulary save where it is two thirds of the model? Gemma 3 270M's sizes.

Random weights, and a SentencePiece vocabulary of 262,144 tokens: trained ones, and joined ones.
32,768 tokens stay. Printed are bytes and tokens/s of both files, decoded in turns by llama.cpp, and
how many of 10,000 mixed lines come back byte for byte, by tokenizers and by llama.cpp's ids.

    python -m benchmarks.gemma_vocabulary --out build/gemma
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import generate_merges

from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.pruning.structures import vocabulary
from racdeploy.verification.probe_strings import make_mixed_lines
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import make_checkpoint

TOKENS, KEPT = 262_144, 32_768
SIZES: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "vocab_size": TOKENS,
}
ROUNDS, NEW_TOKENS = 5, 64


def make_model(folder: Path) -> Checkpoint:
    """Write the model; the tokens beyond the trained ones join a token and a trained one."""
    make_checkpoint(folder, "gemma3_text", pre_tokenizer="gemma", **SIZES)
    file = folder / "tokenizer.json"
    written: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    vocab = written["model"]["vocab"]
    added = {token["content"] for token in written["added_tokens"]}
    own = [token for token in written["added_tokens"] if token["content"] not in vocab]
    for token, i in zip(own, range(TOKENS - len(own), TOKENS), strict=True):
        token["id"] = i
    plain = [text for text in vocab if text not in added and "<" not in text]
    joined, chosen = list(plain), random.Random(0)
    for i in range(len(vocab), TOKENS - len(own)):
        while (text := chosen.choice(joined) + chosen.choice(plain)) in vocab or text in added:
            pass
        vocab[text] = i
        joined.append(text)

    scores = {text: -i for text, i in vocab.items() if text not in added and "<" not in text}
    merges = generate_merges(vocab, scores)
    written["model"]["merges"] = [list(pair) for pair in merges]
    file.write_text(json.dumps(written), encoding="utf-8")
    return Checkpoint(folder)


def main() -> None:
    """Cut, export and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    dense = make_model(out / "dense")
    tokenizer = read_tokenizer(dense.tokenizer.file)
    used = {i for ids in tokenizer.encode_batch(make_mixed_lines(500)) for i in ids}
    small = vocabulary.rewrite(dense, vocabulary.choose(dense, KEPT, used), out / "cut")
    files = [out / "dense.gguf", out / "cut.gguf"]
    for checkpoint, path in zip((dense, Checkpoint(small)), files, strict=True):
        export(checkpoint, path, quant="q8_0")

    speeds: list[list[float]] = [[], []]
    sampling = Sampling(NEW_TOKENS, ())
    for _ in range(ROUNDS):
        for path, found in zip(files, speeds, strict=True):
            with open_engine("llamacpp", path, EngineSettings(threads=1)) as engine:
                engine.generate([[5, 6, 7]], sampling)
                found.append(NEW_TOKENS / float(engine.stats["decode_s"]))
    sizes = [path.stat().st_size for path in files]
    medians = [statistics.median(found) for found in speeds]
    ratio = statistics.median(b / a for a, b in zip(*speeds, strict=True))
    print(f"bytes {sizes[0]:,} → {sizes[1]:,}, {sizes[1] / sizes[0]:.3f} of dense")
    print(f"tokens/s {medians[0]:.1f} → {medians[1]:.1f}, {ratio:.2f} times")

    lines = make_mixed_lines(10_000)
    cut = read_tokenizer(small / "tokenizer.json")
    for name, reader, path in zip(("dense", "cut"), (tokenizer, cut), files, strict=True):
        ids = reader.encode_batch(lines)
        back = sum(a == b for a, b in zip(lines, reader.decode_batch(ids), strict=True))
        (answer,) = ask_llama([path], [1, 2], lines)
        alike = sum(a == b for a, b in zip(ids, answer.tokens, strict=True))
        print(f"{name}: of {len(lines):,} lines {back:,} come back, {alike:,} have llama.cpp's ids")


if __name__ == "__main__":
    main()

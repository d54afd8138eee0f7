"""GGUF files that a publisher could have spoiled, written with the ``gguf`` package."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf

OTHER_EOS_ID = 30
MERGE = 20  # index of the removed one


def spoil(fault: str, source: Path, file: Path) -> Path:
    """Write a copy with one fault."""
    return _FAULTS[fault](source, file)


def add_float(source: Path, file: Path, key: str, value: float) -> Path:
    """Write a copy with one more number in its metadata."""
    return rewrite(source, file, lambda _, value: value, {key: value})


def rewrite(
    source: Path,
    file: Path,
    edit: Callable[[str, Any], Any],
    added: Mapping[str, float] | None = None,
) -> Path:
    """Write a file again with edited and added metadata values."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, edit(key, field.contents()), kind, inner)
    for key, value in (added or {}).items():
        writer.add_float32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def set_number(source: Path, file: Path, key_end: str, change: Callable[[Any], Any]) -> Path:
    """Write a copy in which one number of the metadata is changed."""
    shutil.copyfile(source, file)
    reader = gguf.GGUFReader(file, "r+")
    (field,) = (field for key, field in reader.fields.items() if key.endswith(key_end))
    field.parts[-1][0] = change(field.parts[-1][0])
    reader.data.flush()
    return file


def set_pre_tokenizer(source: Path, file: Path, name: str) -> Path:
    """Write a copy with another pre-tokenizer; return it."""
    return rewrite(source, file, lambda k, v: name if k == "tokenizer.ggml.pre" else v)


def _set_tensor(source: Path, file: Path, name: str, change: Callable[[Any], None]) -> Path:
    shutil.copyfile(source, file)
    reader = gguf.GGUFReader(file, "r+")
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == name)
    change(tensor.data)
    reader.data.flush()
    return file


def _zero(data: Any) -> None:
    data[:] = 0


def _never_close(source: Path, file: Path) -> Path:
    """Negate the row of the closing tag or its first token: it is never the most likely one."""
    tokens = gguf.GGUFReader(source).fields["tokenizer.ggml.tokens"].contents()
    row = tokens.index("</think>" if "</think>" in tokens else "</")
    return _set_tensor(source, file, "token_embd.weight", lambda data: _negate(data[row]))


def _negate(data: Any) -> None:
    data *= -1


def _rename_tags(key: str, value: Any) -> Any:
    if key == "tokenizer.chat_template":
        return value.replace("think>", "thought>")
    if key == "tokenizer.ggml.tokens":
        return [token.replace("think>", "thought>") for token in value]
    return value


_FAULTS: dict[str, Callable[[Path, Path], Path]] = {
    "eos": lambda s, f: set_number(s, f, "eos_token_id", lambda _: OTHER_EOS_ID),
    "rope": lambda s, f: set_number(s, f, "rope.freq_base", lambda base: 100 * base),
    "zeroed": lambda s, f: _set_tensor(s, f, "blk.1.ffn_down.weight", _zero),
    "endless": _never_close,
    "template": lambda s, f: rewrite(
        s, f, lambda k, v: v.replace("<think>", "") if k == "tokenizer.chat_template" else v
    ),
    "tags": lambda s, f: rewrite(s, f, _rename_tags),
    "bos": lambda s, f: rewrite(
        s, f, lambda k, v: True if k == "tokenizer.ggml.add_bos_token" else v
    ),
    "merge": lambda s, f: rewrite(
        s, f, lambda k, v: v[:MERGE] + v[MERGE + 1 :] if k == "tokenizer.ggml.merges" else v
    ),
}

"""Plan which tensors a GGUF file holds: name, shape, number format, row order.

The plan is made from headers alone, so every refusal comes before the first byte is written. A checkpoint
tensor that no rule covers is an error, and so is a missing one: llama.cpp refuses both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.checkpoint import Checkpoint
from racdeploy.errors import ModelError
from racdeploy.export._gguf_parameters import llama3_rope_factors
from racdeploy.quant.presets import Choice, Mix

# Where rows do not divide into blocks of 256: what keeps zeros falls back to what keeps them.
_FALLBACKS = {"q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q8_0", "q6_k": "q8_0"}
_IGNORED = (".rotary_emb.inv_freq",)
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write.

    Args:
        name: in the file.
        source: in the checkpoint; empty where ``computed`` holds the values.
        shape: as in the checkpoint.
        quant_asked: number format asked for.
        quant_real: number format it gets.
        reason: why the two differ, or empty.
        heads: where not 0, the rows are reordered for llama.cpp's rotary layout within that many heads.
        computed: the values of a tensor that the checkpoint does not hold.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    quant_asked: str
    quant_real: str
    reason: str
    heads: int = 0
    computed: NDArray[np.float32] | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Number of rows and their length; a vector is one row."""
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], self.shape[1])

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        rows, row_length = self.rows
        return rows * round(row_length * quants.load(self.quant_real).BITS / 8)


def plan_tensors(checkpoint: Checkpoint, mix: Mix) -> list[PlannedTensor]:
    """Plan every tensor of the file, in file order.

    Raises:
        ModelError: a tensor is missing, unknown, of a wrong shape, or unknown to llama.cpp.
    """
    names = _names(checkpoint)
    _check_complete(checkpoint, names)
    plan = []
    if (factors := llama3_rope_factors(checkpoint)) is not None:
        plan.append(PlannedTensor(_ROPE_FACTORS, "", factors.shape, "f32", "f32", "", computed=factors))
    for source, name in names.items():
        if source not in checkpoint.entries:
            continue
        shape = checkpoint.entries[source].shape
        _check_shape(checkpoint, source, name, shape)
        choice = _choose(name, shape, mix, checkpoint)
        plan.append(
            PlannedTensor(name, source, shape, choice.asked, choice.quant, choice.reason, _heads(checkpoint, source))
        )
    mix.check(tensor.name for tensor in plan if len(tensor.shape) > 1)
    return plan


def rotary_order(rows: int, heads: int) -> NDArray[np.intp]:
    """Return the row order that turns half-split rotary pairs into llama.cpp's interleaved ones.

    Source: llama.cpp ``conversion/llama.py``, ``LlamaModel.permute``.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return checkpoint name → file name for everything this architecture may hold."""
    family = checkpoint.family
    names = {source: name for source, name in family.model_tensors.items() if source != "lm_head.weight"}
    if not checkpoint.tied:
        names["lm_head.weight"] = family.model_tensors["lm_head.weight"]
    for block in range(checkpoint.block_count):
        names |= {
            f"{family.blocks}.{block}.{source}": f"blk.{block}.{name}" for source, name in family.block_tensors.items()
        }
    return names


def _check_complete(checkpoint: Checkpoint, names: dict[str, str]) -> None:
    held = {name for name in checkpoint.entries if not name.endswith(_IGNORED)}
    if checkpoint.tied:
        held.discard("lm_head.weight")
    if unknown := sorted(held - set(names)):
        raise ModelError(
            f"{checkpoint.folder} holds {len(unknown)} tensors that {checkpoint.family.architecture} does not"
            f" have, the first is {unknown[0]!r}",
            remedy="export the plain model: merge adapters and remove extra heads first",
        )
    biased = {_part(name) for name in held if name.endswith(".bias")}
    needed = {name for name in names if not name.endswith(".bias") or _part(name) in biased}
    if missing := sorted(needed - held):
        raise ModelError(
            f"{checkpoint.folder} lacks {len(missing)} tensors, the first is {missing[0]!r}",
            remedy="the checkpoint is incomplete; save or download it again",
        )
    arch = checkpoint.family.gguf_arch
    if arch != "llama" and (lost := sorted(biased - {"q_proj.bias", "k_proj.bias", "v_proj.bias"})):
        raise ModelError(f"llama.cpp's {arch} models have no {lost[0]}, and this checkpoint does")


def _part(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _check_shape(checkpoint: Checkpoint, source: str, name: str, shape: tuple[int, ...]) -> None:
    D, F = checkpoint.integer("hidden_size"), checkpoint.integer("intermediate_size")
    K = checkpoint.head_size
    Q, KV = checkpoint.integer("num_attention_heads") * K, checkpoint.key_value_heads * K
    V = checkpoint.integer("vocab_size")
    weights = {
        "attn_q": (Q, D), "attn_k": (KV, D), "attn_v": (KV, D), "attn_output": (D, Q),
        "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F), "token_embd": (V, D), "output": (V, D),
        "attn_q_norm": (K,), "attn_k_norm": (K,),
    }  # fmt: skip
    part, _, kind = name.rpartition(".")
    expected: tuple[int, ...] = weights.get(part.rpartition(".")[2], (D,))
    if kind == "bias":
        expected = expected[:1]
    if shape != expected:
        raise ModelError(
            f"{checkpoint.folder}: {source!r} has shape {list(shape)}, its config.json means {list(expected)}",
            remedy="the weights and the config belong to different models",
        )


def _heads(checkpoint: Checkpoint, source: str) -> int:
    for linear in checkpoint.family.rotary_permuted:
        if source.rpartition(".")[0].endswith(linear):
            key = linear.endswith("k_proj")
            return checkpoint.key_value_heads if key else checkpoint.integer("num_attention_heads")
    return 0


def _choose(name: str, shape: tuple[int, ...], mix: Mix, checkpoint: Checkpoint) -> Choice:
    """Return the number format of a tensor, and why it is not the one asked for."""
    if len(shape) == 1:
        return Choice(mix.quant, "f32", "" if mix.quant == "f32" else "vectors are stored in f32")
    choice = mix.choose(name, checkpoint.block_count, checkpoint.tied)
    chosen, reasons = choice.quant, [choice.reason]
    while why := quants.fits(quants.load(chosen), shape[-1]):
        chosen = _FALLBACKS.get(chosen, "f16")
        reasons.append(why)
    return Choice(choice.asked, chosen, "; ".join(dict.fromkeys(filter(None, reasons))))


def iterate_rows(tensor: PlannedTensor, slab_weights: int) -> Iterator[slice]:
    """Yield slices of rows that hold about ``slab_weights`` weights each."""
    rows, row_length = tensor.rows
    step = max(1, slab_weights // row_length)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))

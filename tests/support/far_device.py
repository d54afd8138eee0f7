"""A device that is not the CPU, on a machine that has nothing else.

Tensors there are CPU tensors in disguise: they say they are on ``FAR``, and the mode refuses every
operation that mixes them with CPU tensors, where a GPU would. Only what a GPU also takes passes:
numbers without dimensions, masks and indices on the CPU, and copies. Made for the walk over the
blocks: attention comes from torch's math kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FAR", "far_device"]

FAR = torch.device("privateuseone")
_aten = torch.ops.aten
_MAY_MIX = {
    _aten.copy_.default,
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class _Guard(torch._C._acc.DeviceGuard):
    """What torch enters before it works on the device; it needs no more than to be there."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


torch._C._acc.register_python_privateuseone_device_guard(_Guard())


class _FarTensor(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> _FarTensor:
        made: _FarTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=FAR
        )
        made.near = near
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"far {self.near!r}"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _FarMode(TorchDispatchMode):
    """Take over what makes tensors on the far device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def far_device() -> Iterator[None]:
    """While the body runs, ``FAR`` is a device."""
    module = SimpleNamespace(
        _lazy_init=lambda: None, get_amp_supported_dtype=lambda: [torch.bfloat16]
    )
    torch._register_device_module(FAR.type, module)
    make = torch.tensor  # asks the device for memory before a mode sees it

    def make_near(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made = make(data, **options)
        return made if device is None else made.to(device)

    torch.tensor = make_near  # type: ignore[assignment]
    try:
        with _FarMode(), torch.inference_mode():
            yield
    finally:
        torch.tensor = make
        delattr(torch, FAR.type)
        del sys.modules[f"torch.{FAR.type}"]


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    flat = [*_flatten(args), *_flatten(kwargs.values())]
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    far = [value for value in tensors if isinstance(value, _FarTensor)]
    near = [
        value
        for value in tensors
        if not isinstance(value, _FarTensor) and value.dim() and not value.is_meta
    ]
    if far and near and func not in _MAY_MIX:
        raise RuntimeError(f"{func} got tensors on {FAR} and on the cpu")
    if func is _aten._fused_sdp_choice.default:
        return 0  # the math kernel
    asked = next((value for value in flat if isinstance(value, torch.device)), None)
    where = asked or (FAR if far else None)
    found = func(*map(_near, args), **{name: _near(value) for name, value in kwargs.items()})
    if where != FAR:
        return found
    return _wrap(found, {id(value.near): value for value in far})


def _flatten(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what is in lists of lists; torch's own way takes longer than a small operation."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        else:
            yield value


def _near(value: Any) -> Any:
    if isinstance(value, _FarTensor):
        return value.near
    if isinstance(value, list | tuple):
        return [*map(_near, value)]
    return torch.device("cpu") if isinstance(value, torch.device) and value == FAR else value


def _wrap(found: Any, own: Mapping[int, _FarTensor]) -> Any:
    """Take results to the far device; operations in place give back the tensor they got."""
    if isinstance(found, torch.Tensor):
        return own[id(found)] if id(found) in own else _FarTensor(found)
    if isinstance(found, list | tuple):
        return type(found)([_wrap(each, own) for each in found])
    return found

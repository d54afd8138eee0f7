"""The AVX-VNNI kernels on any processor with AVX2: a signal handler computes VPDPBUSD."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from kernels.tests.support.compiling import build


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 has the instruction")
def test_products_in_the_encoding_of_consumer_processors() -> None:
    """They are those of the portable kernels; the program has VPDPBUSD, or does not compile."""
    features = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    if "avx2" not in features:
        pytest.skip("this processor has no AVX2")

    done = subprocess.run([build("vnni_driver")], capture_output=True, text=True, check=True)
    difference, emulated = done.stdout.split()
    assert 0 < float(difference) <= 1e-6
    assert int(emulated) == 0 or int(emulated) > 1000  # 0: the processor has it, whatever it says

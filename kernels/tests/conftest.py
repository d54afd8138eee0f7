"""What these tests run under: racdeploy's own settings, and a folder for proofs of their own.

``emulated`` tests, and ``slow`` ones, run with ``make test-kernels`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import _keep_heap

__all__ = ["_keep_heap"]


@pytest.fixture(scope="session", autouse=True)
def _own_proofs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep this machine's user's proofs away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RACDEPLOY_ACCEL", str(tmp_path_factory.mktemp("proofs")))
        yield

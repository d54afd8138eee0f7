"""The workspace that stages of a build share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_STAGES = """
import sys
import numpy as np
from pathlib import Path
from racdeploy.pipeline.workspace import Workspace
from racdeploy.processes.heap import keep_heap
from racdeploy.processes.memory import resident_bytes

keep_heap()
arrays = [np.ones(1 << 20, np.uint8) for _ in range(257)]
del arrays[:256]  # the last one keeps the heap's end in use
before = resident_bytes()
Workspace(Path(sys.argv[1])).open("export", {})
print(before - resident_bytes())
"""


def test_a_stage_does_not_keep_the_memory_of_the_one_before(tmp_path: Path) -> None:
    """The pruning of a large model frees gigabytes, which its heap keeps for the next block."""
    command = [sys.executable, "-c", _STAGES, str(tmp_path)]
    returned = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(returned) > 128 << 20, "of 256 MiB"

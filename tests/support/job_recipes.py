"""Recipes of the smallest jobs that several processes or machines share."""

from __future__ import annotations

TRACES = """
[traces]
count = 24
batch_size = 5
max_new_tokens = 40
[calibration]
keep_truncated = true
"""
RECOVERY = f"""{TRACES}held_out_share = 0.2
[recover]
batch_tokens = 200
on_policy = 0.0
max_accuracy_drop = 0.9
learning_rate = 0.001
methods = ["full", "blockwise"]
"""

"""Run optimum's export in a process of its own: PREPARED_FOLDER OUT_FOLDER."""

from __future__ import annotations

import sys

from optimum.exporters.onnx import main_export


def main() -> None:
    """Export one folder."""
    prepared, out = sys.argv[1:]
    main_export(
        prepared,
        output=out,
        task="text-generation-with-past",
        framework="pt",
        device="cpu",
        dtype="fp32",
        do_validation=False,
        local_files_only=True,
    )


if __name__ == "__main__":
    main()

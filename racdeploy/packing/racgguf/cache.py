"""Plain files of containers, in the user's cache: unpacked on first use, checked on every use.

A file is named by its SHA-256, so containers of the same model share it, and may be removed at any time.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.packing.racgguf.container import Container
from racdeploy.storage.caches import cache_folder
from racdeploy.storage.files import disk_errors, file_sha256


def unpacked(path: Path) -> Path:
    """Return the plain GGUF file of a container; the folder is ``racdeploy/unpacked`` under the user's cache.

    Raises:
        ArtifactError: the container is damaged.
        EnvironmentFailure: the cache is full or not writable.
    """
    container = Container.open(path)
    file = cache_folder("unpacked") / f"{container.sha256}.gguf"
    if not file.is_file() or file_sha256(file) != container.sha256:
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        container.unpack(file)
    return file

"""The browser example's server: three folders, nothing beside them, and the headers that threads
need.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "examples" / "browser" / "serve.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script(SCRIPT, "browser_example")


@pytest.fixture
def served(example: ModuleType, tmp_path: Path) -> Iterator[http.client.HTTPConnection]:
    (tmp_path / "secret.txt").write_text("no", encoding="utf-8")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "racdeploy.json").write_text("{}", encoding="utf-8")
    (bundle / "link.txt").symlink_to(tmp_path / "secret.txt")
    for name in example.PACKAGES:
        (tmp_path / "node_modules" / name).mkdir(parents=True)
    server = example.serve(bundle, tmp_path / "node_modules", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    yield connection
    connection.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/app.js", 200),
        ("/bundle/racdeploy.json", 200),
        ("/bundle/../secret.txt", 404),
        ("/bundle/%2e%2e/secret.txt", 404),
        ("/bundle/link.txt", 404),
        ("/npm/../secret.txt", 404),
        ("/../../pyproject.toml", 404),
    ],
)
def test_only_its_folders_are_served(
    served: http.client.HTTPConnection, path: str, status: int
) -> None:
    """Neither a path that climbs nor a link leads out."""
    served.request("GET", path)
    answer = served.getresponse()
    answer.read()
    assert answer.status == status
    assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"


def test_what_is_missing_is_named_with_the_command(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a bundle"):
        example.serve(tmp_path, tmp_path, 0)
    (tmp_path / "racdeploy.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="npm install --ignore-scripts"):
        example.serve(tmp_path, tmp_path / "node_modules", 0)

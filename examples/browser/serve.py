"""Serve the page, a bundle and the npm packages on this machine only.

    npm install --ignore-scripts --prefix build/browser @huggingface/transformers@4 @wllama/wllama@3
    racdeploy build tiny-reasoner --target browser --more-targets gguf --out build/browser-bundle
    python examples/browser/serve.py build/browser-bundle

Two headers isolate the page from other sites, which is what browsers ask for before WebAssembly may
use threads.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-store",
}
TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
PACKAGES = ("@huggingface/transformers", "onnxruntime-web", "@wllama/wllama")


class Handler(SimpleHTTPRequestHandler):
    """Files of three folders, and nothing beside them."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES

    def __init__(self, *arguments: object, places: dict[str, Path]) -> None:
        self._places = places
        super().__init__(*arguments)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """Return the file of an address; one that leaves its folder does not exist."""
        name = unquote(urlsplit(path).path)
        prefix = next(prefix for prefix in self._places if name.startswith(prefix))
        folder = self._places[prefix].resolve()
        file = (folder / (name.removeprefix(prefix) or "index.html")).resolve()
        return str(file if file.is_relative_to(folder) else folder / "does-not-exist")

    def end_headers(self) -> None:
        """Add the headers of every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, template: str, *values: object) -> None:
        """Print what failed only."""
        if not str(values[1:2]).startswith("('2"):
            super().log_message(template, *values)


def serve(bundle: Path, npm: Path, port: int) -> ThreadingHTTPServer:
    """Return a server on loopback; port 0 takes a free one.

    Raises:
        SystemExit: the bundle or a package is not there.
    """
    if not (bundle / "racdeploy.json").is_file():
        raise SystemExit(f"{bundle} is not a bundle: give the folder that racdeploy build wrote")
    if missing := [name for name in PACKAGES if not (npm / name).is_dir()]:
        raise SystemExit(
            f"{npm} has no {', '.join(missing)}\n"
            f"  → npm install --ignore-scripts --prefix {npm.parent} "
            "@huggingface/transformers@4 @wllama/wllama@3"
        )
    places = {"/bundle/": bundle, "/npm/": npm, "/": Path(__file__).parent}
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, places=places))


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder that racdeploy build wrote")
    parser.add_argument("--npm", type=Path, default=Path("build/browser/node_modules"))
    parser.add_argument("--port", type=int, default=8010)
    arguments = parser.parse_args()
    server = serve(arguments.bundle, arguments.npm, arguments.port)
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

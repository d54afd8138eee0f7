"""The parts of the documents that the code decides: ``python -m tests.support.documents``.

The command rewrites what lies between ``<!-- NAME -->`` and ``<!-- /NAME -->``. ``tree`` is the
units of racdeploy with the first sentence of their docstrings, ``plugins`` what ``racdeploy
plugins`` lists, ``families`` a table of them with what no test compares, ``errors`` every error
with its code; the others quote a file. tests/documents/test_docs.py compares.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from racdeploy import plugins
from racdeploy.models.family_support import describe_families
from tests.support.error_codes import EXIT_CODES, list_raised

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "racdeploy"
_WRITTEN = ("ARCHITECTURE.md", "CONTRIBUTING.md", "docs/families.md", "docs/reference/errors.md")
FILES = tuple(ROOT / name for name in _WRITTEN)
PLUGIN_FOLDERS = {package.replace(".", "/") for package in plugins.KINDS.values()}
COLUMNS = 118
SUMMARY_COLUMN = 25


def rewrite(text: str) -> str:
    """Return a document with every generated part as the code has it now."""
    for name, generate in PARTS.items():
        part = f"<!-- {name} -->\n{generate()}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, part=part: part, text, flags=re.DOTALL)
    return text


def list_plugins() -> str:
    """Return a line for each kind: its name, then its plugins."""
    lines = [f"{kind}: {', '.join(plugins.list_names(kind))}" for kind in plugins.KINDS]
    return _fence("\n".join(lines))


def draw_tree() -> str:
    """Return every unit and every package below it, each with what it says of itself."""
    lines = ["racdeploy/"]

    for file in sorted(PACKAGE.iterdir(), key=lambda file: (file.is_dir(), file.name)):
        if file.suffix == ".py" and file.name != "__init__.py":
            lines.append(_describe(file.name, file, depth=1))
        elif (file / "__init__.py").is_file():
            lines += _draw_package(file, depth=1)
    return _fence("\n".join(lines))


def tabulate_families() -> str:
    """Return a row for each family: what ``racdeploy families`` knows, and missing comparisons."""
    compared = {
        "logits": _list_cases("tests/exporting/test_gguf.py"),
        "file": _list_cases("tests/exporting/test_oracle.py"),
    }
    lines = [
        "| family | models | llama.cpp | ONNX | cuts |",
        "|---|---|---|---|---|",
    ]

    for row in describe_families():
        missing = [what for what, families in compared.items() if row.family not in families]
        gguf = f"`{row.gguf}`" + (f", {' and '.join(missing)} not compared" if missing else "")
        is_new = row.transformers >= "5"
        newer = f" (transformers {row.transformers})" if is_new else ""
        cells = (f"`{row.family}`", row.models + newer, gguf)
        rest = (", ".join(row.onnx) or "none", ", ".join(row.cuts[:-1]) or "none")
        lines.append(f"| {' | '.join((*cells, *rest))} |")

    return "\n".join(lines)


def tabulate_errors() -> str:
    """Return a row for each code and sentence, values in braces as the source has them."""
    lines = ["| code | exit | what it says | what to do |", "|---|---|---|---|"]
    for each in list_raised():
        cells = (f"`{each.code}`", str(EXIT_CODES[each.kind]), each.sentence, each.remedy)
        lines.append(f"| {' | '.join(map(_as_cell, cells))} |")
    return "\n".join(lines)


def _as_cell(text: str) -> str:
    """Return a text that is no link, tag or end of a cell."""
    text = " ".join(text.split()).replace("<", "&lt;")
    return re.sub(r"([|\[\]])", r"\\\1", text)


def _list_cases(path: str) -> set[str]:
    """Return the families that a table of cases names."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return set(re.findall(r'"family": "(\w+)"', text.partition("\nCASES")[2].partition("\n}\n")[0]))


def quote(path: str) -> str:
    """Return a file of the repository as an example."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return _fence(text.strip(), "python")


def _draw_package(folder: Path, depth: int) -> Iterator[str]:
    yield _describe(f"{folder.name}/", folder / "__init__.py", depth)
    if folder.relative_to(ROOT).as_posix() in PLUGIN_FOLDERS and folder.name != "export":
        return
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").is_file():
            yield from _draw_package(inner, depth + 1)


def _fence(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"


def _describe(name: str, file: Path, depth: int) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.?!]) ", paragraph)[0]
    sentence = re.sub(r":\w+:`[\w.]*?(\w+)`", r"\1", sentence).replace("``", "")

    start = f"{'  ' * depth}{name}".ljust(SUMMARY_COLUMN)
    indent = " " * SUMMARY_COLUMN
    return textwrap.fill(
        sentence,
        COLUMNS,
        initial_indent=start,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


PARTS: dict[str, Callable[[], str]] = {
    "errors": tabulate_errors,
    "families": tabulate_families,
    "plugins": list_plugins,
    "remainder": partial(quote, "tests/support/one_more/tasks/remainder.py"),
    "tree": draw_tree,
}


def main() -> None:
    """Rewrite the documents in place."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if (written := rewrite(text)) != text:
            file.write_text(written, encoding="utf-8")
            print(f"rewrote {file.name}")


if __name__ == "__main__":
    main()

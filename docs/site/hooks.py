"""Pages of the site that lie elsewhere in the repository or that the code decides, and their links.

Only mkdocs imports this file; see mkdocs.yml.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SOURCE = "https://github.com/racdeploy/racdeploy/blob/main/"
COPIED = {
    "ARCHITECTURE.md": "how-it-works.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "kernels/README.md": "kernels.md",
    "benchmarks/RESULTS-archive.md": "results-archive.md",
}
"""Documents outside docs/, and the pages that show them."""
TITLES = {
    "how-it-works.md": "How it works",
    "results.md": "Results",
    "results-archive.md": "Results: archive",
}
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every guide that nobody has listed."""
    listed = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    docs = Path(config.docs_dir)
    left = sorted(file.name for file in docs.glob("*.md") if file.name not in listed)

    for section in config.nav or ():
        if isinstance(section, dict) and "Guides" in section:
            section["Guides"] += left
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in COPIED.items()}
    pages["reference/cli.md"] = write_commands()
    pages["reference/recipe.md"] = write_recipe()

    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site, or into the repository."""
    place = page.file.src_uri
    sources = {shown: source for source, shown in COPIED.items()}
    origin = sources.get(place, f"docs/{place}")
    if place in TITLES:
        page.title = TITLES[place]

    # Code is no place for links.
    parts = _FENCED.split(markdown)
    for number in range(0, len(parts), 2):
        parts[number] = _LINK.sub(
            lambda found: found[1] + lead(found[2], origin, place) + found[3], parts[number]
        )
    return "".join(parts)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out Sphinx's roles, which docstrings have in front of names."""
    return re.sub(r":(?:py:)?[a-z]+:(<code>)~?", r"\1", html)


def lead(link: str, origin: str, place: str) -> str:
    """Return where a link leads on the site.

    Args:
        link: as the document has it.
        origin: the document's path in the repository.
        place: the page's path below docs/.
    """
    if re.match(r"[a-z]+:|#", link):
        return link

    path, mark, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    if target in COPIED:
        shown = COPIED[target]
    elif target.startswith("docs/") and not target.startswith("docs/site/"):
        shown = target.removeprefix("docs/")
    else:
        return f"{SOURCE}{target}{mark}{anchor}"

    relative = posixpath.relpath(shown, posixpath.dirname(place) or ".")
    return f"{relative}{mark}{anchor}"


def write_recipe() -> str:
    """Return the page of the recipe: the commented file that ``racdeploy init`` writes."""
    text = (ROOT / "racdeploy" / "recipe" / "recipe.toml").read_text(encoding="utf-8")
    return (
        "# Recipe\n\n"
        "What a build shall do, in a file: `racdeploy init` writes this one, "
        "`racdeploy build --recipe recipe.toml`\n"
        "carries it out. `--set PART.KEY=VALUE` sets any key on the command line.\n\n"
        f"```toml\n{text}```\n"
    )


def write_commands() -> str:
    """Return the page of the command line, from the commands themselves."""
    import typer.main

    from racdeploy.cli.app import app

    lines = ["# Command line", "", "Exit codes: 0 passed or done · 1 a check of the gate failed ·"]
    lines += ["2 wrong usage, recipe or bundle · 3 inconclusive ·"]
    lines += ["4 an engine or the machine failed ·"]
    lines += ["130 interrupted. `--json` prints one object, also for errors.", ""]

    root = typer.main.get_command(app)
    for name, command in _commands(root, "racdeploy"):
        lines += _describe(name, command)
    return "\n".join(lines) + "\n"


def _commands(group: Any, name: str) -> list[tuple[str, Any]]:
    found = []
    for verb, command in group.commands.items():
        full = f"{name} {verb}"
        found += _commands(command, full) if hasattr(command, "commands") else [(full, command)]
    return found


def _describe(name: str, command: Any) -> list[str]:
    """Return a command's section: usage, what it does, its arguments and options, an example."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = [_argument_name(each) for each in arguments]
    lines = [f"## {name.removeprefix('racdeploy ')}", ""]
    lines += [f"`{' '.join([name, *words])} [OPTIONS]`", ""]
    lines += [(command.help or "").strip(), "", "| | | default |", "| --- | --- | --- |"]

    for each in command.params:
        names = ", ".join(f"`{part}`" for part in (*each.opts, *each.secondary_opts))
        if each.param_type_name == "argument":
            names = f"`{_argument_name(each)}`"
        lines.append(f"| {names} | {_cell(each.help)} | {_default(each)} |")

    if command.epilog:
        lines += ["", "```sh", command.epilog.removeprefix("Example: "), "```"]
    return [*lines, ""]


def _argument_name(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper()
    return name if argument.required else f"[{name}]"


def _default(option: Any) -> str:
    value = option.default
    if value in (None, False, "", ()) or callable(value) or str(value).startswith("Sentinel"):
        return ""
    return f"`{value}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")

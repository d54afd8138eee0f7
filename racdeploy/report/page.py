"""HTML pages: a template with its style, its script, and a policy that allows nothing else.

Text in them is hostile: the templates escape everything. ``parts.html.jinja`` has shared elements.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from racdeploy.report.axis import load_templates

_STYLE = "report.css"
_SCRIPT = "page.js"


def render_page(template: str, values: Mapping[str, object], scripts: Sequence[str] = ()) -> str:
    """Return a self-contained page, whose security policy allows only its own style and script.

    Args:
        template: file in the folder of this module.
        values: variables of the template.
        scripts: files in the folder of this module, appended to the script of every page.
    """
    style = _read_assets(_STYLE)
    script = _read_assets(_SCRIPT, *scripts)

    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = load_templates().get_template(template)
    return page.render(values, policy=policy, style=style, script=script)


@cache
def _read_assets(*names: str) -> Markup:
    """Return files of this folder as the content of one element: its hash must match exactly."""
    folder = files("racdeploy.report")
    texts = [(folder / name).read_text(encoding="utf-8") for name in names]
    return Markup("\n" + "\n".join(texts))


def _hash(text: str) -> str:
    """Return the source expression of an inline element in a content security policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

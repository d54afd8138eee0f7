"""Write report.md as a comment on the pull request, or replace the one of the last run.

The comment is known by its author, whom the token belongs to, and by a hidden line that names the
models, so two jobs have two comments. Anybody can write that line: a comment of somebody else's
would be theirs to change after the report is in it. A token that may not write, as that of a fork
has, is a warning: the verdict does not hang on a comment.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_PAGE = 100
_MOST_CHARACTERS = 65_536  # of a comment, above which GitHub refuses it


def main() -> None:
    """Write or replace the comment."""
    number = _pull_request()
    if number is None:
        sys.stdout.write("::notice::this run belongs to no pull request, so there is no comment\n")
        return
    root = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/issues"
    models = os.environ.get("RACDEPLOY_CANDIDATE") or os.environ["RACDEPLOY_BUNDLE"]
    names = ", ".join(line.strip() for line in models.splitlines() if line.strip())
    marker = f"<!-- racdeploy: {names.replace('--', '- -')} -->"
    try:
        found = _find(f"{root}/{number}/comments", marker, _ask_who_writes())
        if found is None:
            _ask("POST", f"{root}/{number}/comments", {"body": _body(marker)})
        else:
            _ask("PATCH", f"{root}/comments/{found}", {"body": _body(marker)})
    except urllib.error.HTTPError as error:
        said = f"GitHub answers {error.code} {error.reason}"
        _warn(
            f"{said}; the job needs `permissions: pull-requests: write`"
            if error.code in (401, 403, 404)
            else said
        )
    except (OSError, LookupError) as error:
        _warn(str(error))


def _pull_request() -> int | None:
    event = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
    number = event.get("pull_request", {}).get("number")
    return int(number) if number is not None else None


def _body(marker: str) -> str:
    report = (Path(os.environ["RACDEPLOY_REPORTS"]) / "report.md").read_text(encoding="utf-8")
    server, repository = os.environ["GITHUB_SERVER_URL"], os.environ["GITHUB_REPOSITORY"]
    run = f"{server}/{repository}/actions/runs/{os.environ['GITHUB_RUN_ID']}"
    link = f"[report.html and every prompt]({run})"
    end = f"\n{link} are among the artifacts of this run.\n"

    # racdeploy keeps its reports short; another version, or what a failed run said, may not.
    left = _MOST_CHARACTERS - len(marker) - len(end) - 1
    if len(report) > left:
        report = report[:left].rpartition("\n")[0] + "\n"
    return f"{marker}\n{report}{end}"


def _ask_who_writes() -> str:
    """Return the name that the token writes under; REST's /user refuses the token of a workflow."""
    answer = _ask("POST", os.environ["GITHUB_GRAPHQL_URL"], {"query": "{ viewer { login } }"})
    login = ((answer.get("data") or {}).get("viewer") or {}).get("login")
    if not isinstance(login, str) or not login:
        raise LookupError("GitHub does not say who writes with this token")
    return login


def _find(url: str, marker: str, author: str) -> int | None:
    """Return the author's comment that begins with the marker."""
    page = 1
    while True:
        comments = _ask("GET", f"{url}?per_page={_PAGE}&page={page}")
        for comment in comments:
            is_own = (comment.get("user") or {}).get("login") == author  # of a ghost there is none
            if is_own and str(comment["body"]).startswith(marker):
                return int(comment["id"])
        if len(comments) < _PAGE:
            return None
        page += 1


def _ask(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    headers = {
        "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
        "Accept": "application/vnd.github+json",
        "Content-Type": "application/json",
        "User-Agent": "racdeploy-action",
    }
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def _warn(text: str) -> None:
    sys.stdout.write(f"::warning::the report is not on the pull request: {text}\n")


if __name__ == "__main__":
    main()

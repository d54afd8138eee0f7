"""Run action.yml as a GitHub runner does: expressions, conditions, outputs, a home folder.

Only what the action uses is understood; anything else is an error. Steps that use another action
are noted, not run. Source: GitHub's documentation of composite actions, workflow commands and
default environment variables.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


@dataclass
class Run:
    """What a run of the action left: exit code, outputs, job summary, log, and the steps that used
    other actions.
    """

    code: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    log: str = ""
    used: list[dict[str, Any]] = field(default_factory=list)


def run_action(
    folder: Path,
    inputs: dict[str, str],
    *,
    event: dict[str, Any],
    api: str,
    bin_folder: Path,
    **variables: str,
) -> Run:
    """Run every step until one fails.

    Args:
        folder: workspace of the job.
        inputs: what the workflow gives under ``with``.
        event: the event that started the job.
        api: address of GitHub's API.
        bin_folder: comes first on the path.
        variables: further environment.
    """
    home = folder.parent / f"{folder.name}-runner"
    home.mkdir(exist_ok=True)
    event_file = home / "event.json"
    event_file.write_text(json.dumps(event))
    given = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
    missing = {name for name, spec in ACTION["inputs"].items() if spec.get("required")} - set(
        inputs
    )
    assert not missing, f"inputs are missing: {missing}"
    assert set(inputs) <= set(given), "an input that the action does not have"
    context: dict[str, Any] = {
        "github": {
            "action_path": str(ROOT),
            "token": "the-token",
            "event_name": "pull_request" if "pull_request" in event else "push",
        },
        "runner": {"temp": str(home)},
        "steps": {},
    }
    context["inputs"] = {name: _filled(value, context) for name, value in (given | inputs).items()}
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_API_URL": api,
        "GITHUB_GRAPHQL_URL": f"{api}/graphql",
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "somebody/app",
        "GITHUB_RUN_ID": "77",
        "GITHUB_EVENT_PATH": str(event_file),
        **variables,
    }
    return _steps(folder, home, context, environment)


def _steps(folder: Path, home: Path, context: dict[str, Any], environment: dict[str, str]) -> Run:
    run = Run()
    for number, step in enumerate(ACTION["runs"]["steps"]):
        if "if" in step and not _holds(_EXPRESSION.fullmatch(step["if"]).group(1), context):  # type: ignore[union-attr]
            continue
        if "uses" in step:
            run.used.append({name: _filled(value, context) for name, value in step["with"].items()})
            continue
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "an expression in a script lets an input become a command"
        files = {
            name: home / f"{name}-{number}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
        }
        for file in files.values():
            file.write_text("")
        own = {name: _filled(value, context) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder,
            env=environment | own | {name: str(file) for name, file in files.items()},
            capture_output=True,
            text=True,
            timeout=600,
        )
        run.log += done.stdout + done.stderr
        run.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        outputs = dict(
            line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines()
        )
        context["steps"][step.get("id", str(number))] = {"outputs": outputs}
        if done.returncode:
            run.code = done.returncode
            break
    run.outputs = {
        name: _filled(spec["value"], context) for name, spec in ACTION["outputs"].items()
    }
    return run


def _filled(text: str, context: dict[str, Any]) -> str:
    return _EXPRESSION.sub(lambda match: str(_value(match.group(1), context)), str(text))


def _holds(expression: str, context: dict[str, Any]) -> bool:
    for part in expression.split("&&"):
        left, operator, right = re.fullmatch(r"\s*(\S+) (==|!=) (\S+)\s*", part).groups()  # type: ignore[union-attr]
        if (_value(left, context) == _value(right, context)) != (operator == "=="):
            return False
    return True


def _value(expression: str, context: dict[str, Any]) -> str:
    if expression.startswith("'"):
        return expression.strip("'")
    value: Any = context
    for name in expression.split("."):
        value = value.get(name, "")
    assert isinstance(value, str), f"{expression} is no text"
    return value


def write_program(folder: Path, name: str, body: str) -> None:
    """Write a Python program that the job finds on its path."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!{sys.executable}\n{body}")
    file.chmod(0o755)

"""The GitHub Action: its steps as a runner runs them, its comment on an API that listens here."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from racdeploy.report import markdown
from tests.support.action_runner import ACTION, ROOT, Run, run_action, write_program
from tests.support.sample_report import build_records, build_report

PULL_REQUEST = {"pull_request": {"number": 12}}

# Writes the reports of a verification that ended as WANTED_CODE says; 2 and 4 end without any. Of
# several candidates, it has a code for each.
RACDEPLOY = """
import json, os, pathlib, sys
codes = [int(code) for code in os.environ["WANTED_CODE"].split()]
code = min(set(codes) - {0}, default=0)
pathlib.Path(os.environ["ARGUMENTS"]).write_text(json.dumps(sys.argv[1:]))
if code in (2, 4):
    print("error: the bundle is damaged\\n  ```", file=sys.stderr)
    sys.exit(code)
reports = pathlib.Path(sys.argv[sys.argv.index("--reports") + 1])
models = sys.argv[sys.argv.index("--") + 1:]
for model, its_code in zip(models, codes):
    folder = reports
    if sys.argv[1] == "compare":
        folder = folder / pathlib.Path(model).name
        folder.mkdir()
    verdict = {0: "pass", 1: "fail", 3: "inconclusive"}[its_code]
    (folder / "report.json").write_text(json.dumps({"verdict": verdict}))
    (folder / "report.md").write_text(f"### {verdict}\\n" + os.environ.get("REPORT", ""))
if "--card" in sys.argv:
    print("| model | verdict |", *models)
sys.exit(code)
"""
# pip is only asked; everything else is Python.
PYTHON = """
import json, os, pathlib, sys
if sys.argv[1:3] == ["-m", "pip"]:
    pathlib.Path(os.environ["INSTALLED"]).write_text(json.dumps(sys.argv[3:]))
else:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Comments:
    """Comments of an issue, kept by number, and every request that came."""

    def __init__(self) -> None:
        self.bodies: dict[int, str] = {n: f"comment {n}" for n in range(1, 131)}  # more than a page
        self.authors: dict[int, str | None] = dict.fromkeys(self.bodies, "somebody")
        self.viewer: str | None = "github-actions[bot]"
        self.asked: list[tuple[str, str, str]] = []
        self.status = 0

    def answer(self, method: str, path: str, token: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Answer as GitHub's REST API does."""
        self.asked.append((method, path, token))
        if self.status:
            return self.status, {"message": "Resource not accessible by integration"}
        if path == "/graphql":
            viewer = {"login": self.viewer} if self.viewer else None
            return 200, {"data": {"viewer": viewer}}
        if method == "GET":
            page = int(re.findall(r"&page=(\d+)", path)[0])
            listed = [self._describe(n) for n in self.bodies]
            return 200, listed[100 * (page - 1) : 100 * page]
        number = int(path.rpartition("/")[2]) if method == "PATCH" else max(self.bodies) + 1
        self.bodies[number] = body["body"]
        self.authors.setdefault(number, self.viewer)
        return 201, {"id": number}

    def _describe(self, number: int) -> dict[str, Any]:
        author = self.authors[number]
        user = {"login": author} if author else None
        return {"id": number, "body": self.bodies[number], "user": user}


@pytest.fixture
def comments() -> Comments:
    return Comments()


@pytest.fixture
def api(comments: Comments) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers["Authorization"]
            status, value = comments.answer(
                self.command, self.path, token, json.loads(body or b"{}")
            )
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PATCH = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def job(tmp_path: Path, api: str) -> Any:
    """Return a function that runs the action with a racdeploy that ends as asked."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    write_program(tmp_path / "bin", "racdeploy", RACDEPLOY)
    write_program(tmp_path / "bin", "python", PYTHON)

    def run(
        code: int | str,
        event: dict[str, Any] = PULL_REQUEST,
        environment: dict[str, str] | None = None,
        **inputs: str,
    ) -> Run:
        given = {"bundle": "bundle"} | {
            name.replace("_", "-"): value for name, value in inputs.items()
        }
        files = {
            "ARGUMENTS": str(tmp_path / "arguments.json"),
            "INSTALLED": str(tmp_path / "installed.json"),
        }
        return run_action(
            workspace,
            given,
            event=event,
            api=api,
            bin_folder=tmp_path / "bin",
            WANTED_CODE=str(code),
            **files,
            **(environment or {}),
        )

    return run


@pytest.mark.parametrize(("code", "verdict"), [(0, "pass"), (1, "fail"), (3, "inconclusive")])
def test_the_job_ends_as_the_verification_did(
    job: Any, comments: Comments, code: int, verdict: str
) -> None:
    """After the outputs, the summary, the comment and the upload."""
    run = job(code)
    assert (run.code, run.outputs["verdict"], run.outputs["exit-code"]) == (
        code,
        verdict,
        str(code),
    )
    assert run.summary == f"### {verdict}\n"
    assert comments.bodies[131].startswith(f"<!-- racdeploy: bundle -->\n### {verdict}\n")
    assert "https://github.com/somebody/app/actions/runs/77" in comments.bodies[131]
    kept, uploaded = run.used
    assert kept["path"] == "~/.cache/pip"
    assert uploaded == {"name": "racdeploy", "path": run.outputs["reports"]}


@pytest.mark.parametrize("code", [2, 4])
def test_without_a_verdict_the_job_fails_whatever_was_asked(
    job: Any, comments: Comments, code: int
) -> None:
    """What racdeploy said is in the summary; a report of an earlier run does not speak for this
    one.
    """
    assert job(0, comment="false").code == 0
    run = job(code, exit_zero="true")
    assert (run.code, run.outputs["verdict"]) == (code, "error")
    assert f"exit code {code} and no verdict" in run.summary
    assert "pass" not in run.summary
    assert "the bundle is damaged" in comments.bodies[131]
    assert run.summary.count("```") == 2


@pytest.mark.parametrize("bundle", ["--help", "--version"])
def test_an_option_in_place_of_a_bundle_fails(job: Any, tmp_path: Path, bundle: str) -> None:
    """It is the name of a folder, which is not there: the real command line ends with 2."""
    real = f"import sys\nsys.path[:0] = {[str(ROOT), *sys.path]!r}\n"
    write_program(tmp_path / "bin", "racdeploy", f"{real}from racdeploy.cli import main\nmain()\n")
    run = job(0, bundle=bundle, exit_zero="true", comment="false")
    assert (run.code, run.outputs["verdict"], run.outputs["exit-code"]) == (2, "error", "2")
    assert f"there is no folder {bundle}" in run.summary


@pytest.mark.parametrize("report", ["", "print('usage: racdeploy')"])
def test_a_command_that_ends_well_and_decides_nothing_fails(
    job: Any, tmp_path: Path, report: str
) -> None:
    """As one that shows its help; reporting only does not turn that into a success."""
    write_program(tmp_path / "bin", "racdeploy", report)
    run = job(0, exit_zero="true")
    assert (run.code, run.outputs["verdict"], run.outputs["exit-code"]) == (4, "error", "4")


@pytest.mark.parametrize(
    ("config", "is_told"),
    [
        ('[http "https://github.com/"]\n\textraheader = AUTHORIZATION: basic eA==', True),
        ('[includeIf "gitdir:x"]\n\tpath = /tmp/git-credentials-1.config', True),
        ("[core]\n\tbare = false", False),
        ("", False),
    ],
)
def test_a_token_beside_the_engine_is_a_warning(
    job: Any, tmp_path: Path, config: str, is_told: bool
) -> None:
    """Where actions/checkout left it, by either of its ways, and nowhere else."""
    git = tmp_path / "workspace" / ".git"
    git.mkdir()
    if config:
        (git / "config").write_text(config)
    run = job(0)
    assert run.code == 0
    assert ("persist-credentials: false" in run.log) == is_told
    assert "eA==" not in run.log


@pytest.mark.parametrize("code", [1, 3])
def test_a_verdict_can_be_reported_only(job: Any, code: int) -> None:
    """exit-zero turns a verdict into a notice."""
    run = job(code, exit_zero="true")
    assert (run.code, run.outputs["exit-code"]) == (0, str(code))
    assert f"::notice::exit code {code} is reported only" in run.log


def test_the_comment_is_replaced_and_belongs_to_its_bundle(job: Any, comments: Comments) -> None:
    """A second run changes the first comment, on the second page; another bundle has its own."""
    for code in (1, 0):
        job(code)
    job(0, bundle="other")
    assert set(comments.bodies) == {*range(1, 133)}
    assert "### pass" in comments.bodies[131]
    assert comments.bodies[132].startswith("<!-- racdeploy: other -->")
    assert {token for *_, token in comments.asked} == {"Bearer the-token"}


@pytest.mark.parametrize("author", ["somebody", "github-actions", None])
def test_a_comment_of_somebody_else_is_left_alone(
    job: Any, comments: Comments, author: str | None
) -> None:
    """Whoever wrote the marker first could change the report afterwards."""
    theirs = "<!-- racdeploy: bundle -->\nmine"
    comments.bodies[7], comments.authors[7] = theirs, author
    for code in (1, 0):
        job(code)

    assert comments.bodies[7] == theirs
    assert comments.bodies[131].startswith("<!-- racdeploy: bundle -->\n### pass")
    assert set(comments.bodies) == {*range(1, 132)}


def test_no_comment_is_written_where_its_author_is_not_known(job: Any, comments: Comments) -> None:
    """The verdict counts, and the log says why there is no comment."""
    comments.viewer = None
    run = job(0)
    assert run.code == 0
    assert "::warning::the report is not on the pull request: GitHub does not say who" in run.log
    assert set(comments.bodies) == {*range(1, 131)}


def test_the_comment_shows_the_prompts_that_were_lost(job: Any, comments: Comments) -> None:
    """As racdeploy writes them, whole and folded, above the link to the artifacts."""
    text = markdown.render(build_report(), build_records())
    job(1, event=PULL_REQUEST, environment={"REPORT": text})
    body = comments.bodies[131]
    assert "<summary>4 prompts were lost: dense is right and pruned is not</summary>" in body
    assert "Ann has 63 apples &amp; gives 3 away. | 60 | 60 | 61 |" in body
    assert "actions/runs/77" in body.rpartition("</details>")[2]


def test_a_changed_file_gets_the_prompts_that_it_lost(
    job: Any, comments: Comments, tmp_path: Path
) -> None:
    """A plain file is compared with a reference; its report lies in a folder of its own."""
    report = build_report().model_copy(update={"reference": "f16.gguf"})
    text = markdown.render(report, build_records())
    for code in (0, 1):
        run = job(
            code, bundle="", candidate="out/m.gguf", reference="ref", environment={"REPORT": text}
        )

    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments[0] == "compare"
    assert arguments[-2:] == ["--", "out/m.gguf"]
    assert arguments[arguments.index("--against") + 1] == "ref"
    assert (run.code, run.outputs["verdict"]) == (1, "fail")
    assert Path(run.outputs["reports"]).name == "m.gguf"

    body = comments.bodies[131]
    assert set(comments.bodies) == {*range(1, 132)}
    assert body.startswith("<!-- racdeploy: out/m.gguf -->\n### fail")
    lost = "<summary>4 prompts were lost: reference is right and candidate is not</summary>"
    assert lost in body


def test_several_candidates_have_one_table_and_the_worst_verdict(
    job: Any, comments: Comments, tmp_path: Path
) -> None:
    """The table and the report of each, worst first, are one summary and one comment."""
    text = markdown.render(build_report(), build_records())
    run = job(
        "0 1 3",
        bundle="",
        candidate="out/good.gguf\n  out/bad.gguf \n\nout/few.gguf\n",
        reference="ref",
        environment={"REPORT": text},
    )

    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments[0] == "compare"
    assert "--card" in arguments
    assert arguments[-4:] == ["--", "out/good.gguf", "out/bad.gguf", "out/few.gguf"]

    assert (run.code, run.outputs["verdict"], run.outputs["exit-code"]) == (1, "fail", "1")
    assert run.summary.startswith("| model | verdict | out/good.gguf")
    headings = [line for line in run.summary.splitlines() if line.startswith("### ")]
    assert headings[::2] == ["### fail", "### inconclusive", "### pass"]
    assert run.summary.count("<summary>4 prompts were lost") == 3

    folder = Path(run.outputs["reports"])
    assert {file.name for file in folder.iterdir()} == {
        *("good.gguf", "bad.gguf", "few.gguf", "report.md")
    }
    marker = "<!-- racdeploy: out/good.gguf, out/bad.gguf, out/few.gguf -->\n| model"
    assert comments.bodies[131].startswith(marker)
    assert job("0 3", bundle="", candidate="a\nb", reference="ref").outputs["verdict"] == (
        "inconclusive"
    )


def test_a_candidate_without_its_report_leaves_no_verdict(job: Any) -> None:
    """Two of three are not all."""
    run = job("0 0", bundle="", candidate="a\nb\nc", reference="ref", exit_zero="true")
    assert (run.code, run.outputs["verdict"], run.outputs["exit-code"]) == (4, "error", "4")


def test_a_candidate_without_a_reference_is_wrong_usage(job: Any, tmp_path: Path) -> None:
    """The real command line says which option is missing."""
    real = f"import sys\nsys.path[:0] = {[str(ROOT), *sys.path]!r}\n"
    write_program(tmp_path / "bin", "racdeploy", f"{real}from racdeploy.cli import main\nmain()\n")
    run = job(0, candidate="m.gguf", comment="false")
    assert (run.code, run.outputs["verdict"]) == (2, "error")
    assert "--against" in run.summary


def test_a_comment_that_is_too_long_is_cut_and_keeps_its_link(job: Any, comments: Comments) -> None:
    """GitHub would refuse it, and the pull request would show nothing."""
    job(1, event=PULL_REQUEST, environment={"REPORT": "a line of text\n" * 6000})
    body = comments.bodies[131]
    assert 65_000 < len(body) <= 65_536
    assert body.count("a line of text\n") > 4000
    assert "actions/runs/77" in body.splitlines()[-1]


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_comment_that_cannot_be_written_is_a_warning(
    job: Any, comments: Comments, status: int
) -> None:
    """The token of a fork may not write: the verdict counts, and the log says what is missing."""
    comments.status = status
    run = job(0)
    assert run.code == 0
    assert f"::warning::the report is not on the pull request: GitHub answers {status}" in run.log
    assert ("pull-requests: write" in run.log) == (status != 500)


def test_a_push_has_no_comment(job: Any, comments: Comments) -> None:
    """There is no pull request to write on."""
    assert job(0, event={"ref": "refs/heads/main"}).code == 0
    assert comments.asked == []


def test_no_input_becomes_a_command(job: Any, tmp_path: Path) -> None:
    """A name full of shell is one argument."""
    hostile = (
        f"b; touch {tmp_path}/pwned; $(touch {tmp_path}/pwned) `touch {tmp_path}/pwned` --> ' \""
    )
    job(0, bundle=hostile, gate=hostile, tier=hostile, server_model=hostile)
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments[0] == "verify"
    assert arguments[-2:] == ["--", hostile]
    assert all(
        arguments[arguments.index(f"--{name}") + 1] == hostile
        for name in ("gate", "tier", "server-model")
    )
    assert not (tmp_path / "pwned").exists()


def test_what_is_installed(job: Any, tmp_path: Path) -> None:
    """The version that is asked for, or the one beside the action."""
    installed = tmp_path / "installed.json"
    job(0, version="0.1.0", extras="onnx")
    assert json.loads(installed.read_text()) == ["install", "racdeploy[onnx]==0.1.0"]
    job(0)
    (_, where) = json.loads(installed.read_text())
    assert where.endswith("[gguf,llamacpp]")
    assert (Path(where.partition("[")[0]) / "action.yml").is_file()


def test_every_input_and_output_says_what_it_is() -> None:
    """GitHub shows them; none is required, as there is a bundle or a candidate."""
    for spec in (*ACTION["inputs"].values(), *ACTION["outputs"].values()):
        assert spec["description"].endswith(".")
    assert [name for name, spec in ACTION["inputs"].items() if "default" not in spec] == []


def test_the_runner_of_these_tests_sees_a_failing_step(job: Any, tmp_path: Path) -> None:
    """Without racdeploy on the path the second step fails and nothing after it runs."""
    (tmp_path / "bin" / "racdeploy").unlink()
    shutil.copy("/bin/false", tmp_path / "bin" / "racdeploy")
    run = job(0, exit_zero="true")
    assert (run.code, run.outputs["verdict"]) == (1, "error")

"""The FastAPI example, in this process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.tiny_artifacts import make_thinking_bundle

APP = Path(__file__).parents[2] / "examples" / "fastapi" / "app.py"
QUESTION = {"question": "What is 12 times 34?"}

Run = Callable[[Callable[[httpx.AsyncClient], Awaitable[Any]]], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """What gives a client of the running example to a function, and returns what that returns."""
    spec = importlib.util.spec_from_file_location("fastapi_example", APP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    with pytest.MonkeyPatch.context() as patch:
        # FastAPI looks the types of annotations up there.
        patch.setitem(sys.modules, "fastapi_example", module)
        patch.setenv("BUNDLE", str(make_thinking_bundle(tmp_path_factory.mktemp("example"))))
        spec.loader.exec_module(module)

        async def connect(use: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
            lifespan: AbstractAsyncContextManager[None] = module.load_model(module.app)
            transport = httpx.ASGITransport(module.app)
            async with (
                lifespan,
                httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
            ):
                return await use(client)

        yield lambda use: asyncio.run(connect(use))


def test_clients_get_answers_whole_and_in_pieces(run: Run) -> None:
    """Several at a time; what is streamed is what comes whole; a mistake has its status."""

    async def use(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(client.post("/ask", json=QUESTION) for _ in range(6)))
        first = answers[0].json()
        assert first["answer"] == "The answer is \\boxed{408}."
        assert all(answer.json() == first for answer in answers)

        streamed = await client.post("/stream", json=QUESTION)
        lines = [json.loads(line) for line in streamed.text.splitlines()]
        for kind in ("thinking", "answer"):
            assert "".join(line.get(kind, "") for line in lines).strip() == first[kind]
        assert lines[-1] == {"end": "stop"}

        too_long = await client.post("/ask", json={"question": "word " * 1500})
        assert (too_long.status_code, "at most" in too_long.json()["detail"]) == (413, True)
        assert (await client.post("/ask", json={})).status_code == 422

    run(use)

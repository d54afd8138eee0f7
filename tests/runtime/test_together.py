"""One model, many threads and tasks: decoded together, cancelled and closed from anywhere."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import racdeploy
from racdeploy.errors import EngineError
from racdeploy.runtime import Model, load
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_bundle, make_onnx_bundle
from tests.support.waiting import PATIENCE_S

QUESTIONS = [f"What is {i} + {i}?" for i in range(50)]
FAST = 500  # a tiny model has said as many before anybody can stop it on a busy machine
CONTEXT = {"llamacpp": 1024, "onnxruntime": 256}  # the graph is made for no more


@pytest.fixture(scope="module", params=sorted(CONTEXT))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return make_bundle(folder) if backend == "llamacpp" else make_onnx_bundle(folder)


@pytest.fixture(scope="module")
def long(backend: str) -> int:
    """Tokens of a completion that takes a while; the tiny model never ends by itself."""
    return CONTEXT[backend] - 40


@pytest.fixture(scope="module")
def model(bundle: Path, backend: str) -> Iterator[Model]:
    context_tokens = CONTEXT[backend]
    with load(bundle, threads=1, parallel=4, context_tokens=context_tokens) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(bundle: Path) -> list[racdeploy.Result]:
    """What each question gets from a model that does nothing else."""
    with load(bundle, threads=1) as loaded:
        return [loaded.generate(question) for question in QUESTIONS]


def test_fifty_tasks_get_what_each_gets_alone(model: Model, alone: list[racdeploy.Result]) -> None:
    async def ask_all() -> list[racdeploy.Result]:
        return await asyncio.gather(*map(model.agenerate, QUESTIONS))

    assert asyncio.run(ask_all()) == alone


def test_threads_get_what_each_gets_alone(model: Model, alone: list[racdeploy.Result]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(model.generate, QUESTIONS)) == alone


def test_a_seed_draws_the_same_whatever_runs_beside_it(model: Model) -> None:
    async def draw(seeds: range) -> list[racdeploy.Result]:
        asked = [model.agenerate(QUESTIONS[0], temperature=1.5, seed=seed) for seed in seeds]
        return await asyncio.gather(*asked)

    together = asyncio.run(draw(range(12)))
    assert len({result.answer for result in together}) > 6
    assert [asyncio.run(draw(range(i, i + 1)))[0] for i in range(12)] == together


def test_a_request_joins_what_runs(model: Model, long: int) -> None:
    """A short question is answered while work for seconds goes on beside it."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(model.generate_many, QUESTIONS * 20, max_new_tokens=long, cancel=stop)
        try:
            for question in QUESTIONS[:3]:
                assert model.generate(question, max_new_tokens=4).completion_tokens == 4
            assert not work.done()
        finally:
            stop.set()
        assert work.result()[-1].finish_reason == "cancelled"


def test_a_cancelled_task_stops_its_sequence(model: Model, long: int) -> None:
    """Its tokens are not generated any more, and the model answers the next question."""

    async def ask() -> racdeploy.Result:
        tasks = [
            asyncio.create_task(model.agenerate(question, max_new_tokens=long))
            for question in QUESTIONS
        ]
        await anext(model.astream("Go on.", max_new_tokens=long))  # so that the engine works
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert long < FAST or any(isinstance(end, asyncio.CancelledError) for end in ends)
        return await model.agenerate(QUESTIONS[0], max_new_tokens=3)

    before = model.engine.stats["generated_tokens"]
    assert asyncio.run(ask()).completion_tokens == 3
    generated = model.engine.stats["generated_tokens"] - before
    assert long < FAST or generated < 0.8 * long * len(QUESTIONS)


def test_a_stream_gives_pieces_and_then_the_result(model: Model) -> None:
    stream = model.stream(QUESTIONS[0], max_thinking_tokens=5)
    with raises("stream-not-ended"):
        _ = stream.result

    pieces = list(stream)
    assert stream.result == model.generate(QUESTIONS[0], max_thinking_tokens=5)
    for kind, whole in (("thinking", stream.result.thinking), ("answer", stream.result.answer)):
        assert "".join(p.text for p in pieces if p.kind == kind).strip() == whole
    assert list(stream) == []


def test_an_asynchronous_stream_gives_the_same(model: Model) -> None:
    async def read() -> tuple[list[racdeploy.Piece], racdeploy.Result]:
        stream = model.astream(QUESTIONS[0])
        return [piece async for piece in stream], stream.result

    pieces, result = asyncio.run(read())
    assert (
        "".join(piece.text for piece in pieces if piece.kind == "answer").strip() == result.answer
    )
    assert result == model.generate(QUESTIONS[0])


def test_a_stream_that_is_closed_has_what_came(model: Model, long: int) -> None:
    with model.stream("Go on.", max_new_tokens=long, max_thinking_tokens=long) as stream:
        next(stream)
        stream.close()
    assert stream.result.finish_reason in ("cancelled", "length")
    assert 0 < stream.result.completion_tokens <= long


def test_a_stream_that_is_dropped_ends(model: Model, long: int) -> None:
    """A loop that is left early frees its slot: the next stream would wait for it otherwise."""
    before = model.engine.stats["generated_tokens"]
    for _ in range(5):
        for _ in model.stream("Go on.", max_new_tokens=long):
            break
    model.generate(QUESTIONS[0], max_new_tokens=2)
    generated = model.engine.stats["generated_tokens"] - before
    assert long < FAST or generated < 5 * long


def test_an_asynchronous_stream_is_closed_or_cancelled(model: Model, long: int) -> None:
    async def read_slowly() -> None:
        async for _ in model.astream("Go on.", max_new_tokens=long):
            await asyncio.sleep(0.01)

    async def read() -> racdeploy.Result:
        async with model.astream("Go on.", max_new_tokens=long) as left:
            await anext(left)

        closed = model.astream("Go on.", max_new_tokens=long)
        await anext(closed)
        await closed.aclose()

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_slowly(), 0.1)
        return closed.result

    assert asyncio.run(read()).completion_tokens > 0


def test_an_error_is_raised_where_the_text_would_be(model: Model) -> None:
    """In a task, a loop and a stream alike; it says that the context is the limit."""
    too_long = "x y " * 800
    with raises("prompt-too-long"):
        next(model.stream(too_long))
    with raises("prompt-too-long"):
        asyncio.run(model.agenerate(too_long))

    async def read() -> None:
        async for _ in model.astream(too_long):
            pass

    with raises("prompt-too-long"):
        asyncio.run(read())


def test_a_text_is_continued_as_it_is(model: Model) -> None:
    """Token ids and their text alike: no template round it, tags and all in what follows."""
    text = "What is 2 + 2?<think>"
    ids = model.encoder.encode_text(text)
    by_text = model.continue_text(text, max_new_tokens=9)
    assert by_text == model.continue_text(ids, max_new_tokens=9)
    assert (by_text.prompt_ids, len(by_text.ids)) == (tuple(ids), 9)
    assert by_text.text == model.encoder.decode(by_text.ids)

    async def read() -> list[str]:
        return [piece.text async for piece in model.acontinue_text(ids, max_new_tokens=9)]

    assert "".join(asyncio.run(read())) == by_text.text


def test_closing_ends_what_runs_with_an_error(bundle: Path, long: int) -> None:
    """From any thread, whoever waits: an error of ours, and never a hang."""
    model = load(bundle, threads=1, parallel=2)

    def ask(question: str) -> str:
        try:
            model.generate_many([question] * 200, max_new_tokens=long)
        except EngineError as error:
            return error.code
        return "an answer"

    async def ask_in_task() -> str:
        try:
            await model.agenerate(QUESTIONS[0])
        except EngineError as error:
            return error.code
        return "an answer"

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, question) for question in QUESTIONS[:8]]
        next(model.stream("Go on.", max_new_tokens=long))  # so that the engine works
        model.close()
        ends = [future.result(timeout=PATIENCE_S) for future in asked]

    assert {*ends, asyncio.run(ask_in_task())} == {"engine-closed"}
    model.close()


def test_the_death_of_the_engine_is_told_to_everyone(bundle: Path, long: int) -> None:
    model = load(bundle, threads=1, parallel=2)
    assert model.engine.is_alive()

    def ask(question: str) -> None:
        with raises("engine-died", "SIGKILL"):
            model.generate_many([question] * 200, max_new_tokens=long)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, question) for question in QUESTIONS[:4]]
        next(model.stream("Go on.", max_new_tokens=long))  # so that the engine works
        os.kill(model.engine.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        for future in asked:
            future.result(timeout=PATIENCE_S)

    assert not model.engine.is_alive()
    model.close()

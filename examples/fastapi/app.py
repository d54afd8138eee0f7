"""Your own HTTP API round a bundle: one model, many clients, text as it comes.

pip install "racdeploy[llamacpp]" fastapi uvicorn
BUNDLE=bundle/ uvicorn --app-dir examples/fastapi app:app
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

import racdeploy
from racdeploy.errors import ContextError


class Question(BaseModel):
    """What a client asks."""

    question: str = Field(min_length=1, max_length=10_000)
    max_thinking_tokens: int = Field(default=512, ge=0, le=4096)


class Answer(BaseModel):
    """What it gets."""

    answer: str
    thinking: str
    thinking_tokens: int


@asynccontextmanager
async def load_model(app: FastAPI) -> AsyncIterator[None]:
    """Load the bundle once, in a thread; four questions are answered together."""
    model = await asyncio.to_thread(racdeploy.load, os.environ["BUNDLE"], parallel=4)
    with model:
        app.state.model = model
        yield


app = FastAPI(title="A bundle behind FastAPI", lifespan=load_model)


def loaded(request: Request) -> racdeploy.Model:
    """Return the model of the application."""
    model: racdeploy.Model = request.app.state.model
    return model


Loaded = Annotated[racdeploy.Model, Depends(loaded)]


@app.post("/ask")
async def ask(asked: Question, model: Loaded) -> Answer:
    """Answer when it is whole; a client that goes away changes nothing."""
    try:
        result = await model.agenerate(
            asked.question, max_thinking_tokens=asked.max_thinking_tokens
        )
    except ContextError as error:
        raise HTTPException(413, error.message) from error
    return Answer(
        answer=result.answer, thinking=result.thinking, thinking_tokens=result.thinking_tokens
    )


@app.post("/stream")
async def stream(asked: Question, model: Loaded) -> StreamingResponse:
    """Answer piece by piece, a JSON object a line; a client that goes away ends the sequence."""

    async def lines() -> AsyncIterator[str]:
        pieces = model.astream(asked.question, max_thinking_tokens=asked.max_thinking_tokens)
        async with pieces:
            try:
                async for piece in pieces:
                    yield json.dumps({piece.kind: piece.text}) + "\n"
            except racdeploy.RacdeployError as error:
                yield json.dumps({"error": error.message}) + "\n"
                return
        yield json.dumps({"end": pieces.result.finish_reason}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@app.exception_handler(racdeploy.RacdeployError)
async def say(request: Request, error: racdeploy.RacdeployError) -> JSONResponse:
    """Tell what failed in place of "Internal Server Error"."""
    return JSONResponse({"detail": error.message}, 500)

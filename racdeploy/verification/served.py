"""A model behind the chat API of a server, in place of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from racdeploy.engines.backends.server.chat import ChatEngine, ChatTokenizer
from racdeploy.engines.engine import EngineSettings
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, find_prompt_state


def open_chat(
    url: str,
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    questions: Sequence[str],
    settings: EngineSettings,
    **options: Any,
) -> ChatEngine:
    """Return an engine that sends questions: the server renders its own template.

    Args:
        encoder: counts the tokens of its texts.
        options: of :class:`~.engines.backends.server.ServerEngine`.
    """
    # The chat API takes questions, not ids: map the ids of each prompt back to its question.
    by_ids = {tuple(encoder.encode(question)): question for question in questions}
    conversation = ChatTokenizer(by_ids, encoder.encode_text)
    if tags is not None:
        conversation = replace(
            conversation,
            open_ids=tags.open_ids,
            close_ids=tags.close_ids,
            starts_open=find_prompt_state(next(iter(by_ids)), tags) == "open",
        )
    return ChatEngine(url, settings, conversation, **options)

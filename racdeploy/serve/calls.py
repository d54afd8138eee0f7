"""Calls of tools in an answer, as Qwen3 and Llama 3 write them.

Source: the chat templates of Hermes 3 and Qwen3 (``<tool_call>`` around JSON) and Llama 3.1 (JSON).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from typing import Literal, TypedDict

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from racdeploy.files.reading import Json

CALL_TAG = "<tool_call>"


class _Function(TypedDict):
    name: str
    arguments: str  # JSON


class CallObject(TypedDict):
    """Call of a tool in OpenAI's form."""

    id: str
    type: Literal["function"]
    function: _Function


class _Call(BaseModel):
    name: str
    arguments: Json = Field(validation_alias=AliasChoices("arguments", "parameters"))

    def describe(self) -> CallObject:
        """Return the call in OpenAI's form; templates of Mistral take ids of nine characters."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        function = _Function(name=self.name, arguments=arguments)
        return {"id": uuid.uuid4().hex[:9], "type": "function", "function": function}


def read_calls(text: str, names: Collection[str]) -> list[CallObject]:
    """Return the calls of the named tools that a text consists of; none if it is anything else."""
    parts = re.split("</?tool_call>", text)
    try:
        calls = [_Call.model_validate_json(part) for part in parts if part.strip()]
    except ValidationError:
        return []
    is_known = all(call.name in names for call in calls)
    return [call.describe() for call in calls] if is_known else []

"""Grammar of an answer, written from a JSON schema; only the child process imports it.

llama-cpp-python's converter ignores what it does not know, allows line ends in texts and takes
references of one last name for one. Here an answer keeps all of its schema, or the schema is
refused. It may come from a stranger: without recursion and patterns, a grammar of limited length
has few states, so that no token takes long.
Source: JSON Schema 2020-12; llama.cpp's grammars/README.md, and llama-grammar.cpp of 0.3.36.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import getitem
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from racdeploy.engines.engine import ThinkingBudget
from racdeploy.errors import UsageError
from racdeploy.files.reading import Json

_MAX_CHARACTERS = 100_000  # of a schema; each of its references takes the room of a rule
_MAX_RULE_CHARACTERS = 20_000  # 1,500 short values may take a second before the first token
_NOTES = "$schema $id $defs definitions title description default examples format"
_KINDS = "string integer number boolean null object value"
_RULES = r"""
space ::= " "?
char ::= [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
string ::= "\"" char* "\"" space
integer ::= "-"? ("0" | [1-9] [0-9]{0,15}) space
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})? space
boolean ::= ("true" | "false") space
null ::= "null" space
array ::= "[" space (value ("," space value)*)? "]" space
object ::= "{" space (string ":" space value ("," space string ":" space value)*)? "}" space
value ::= string | number | boolean | null | array | object
root ::= """
_CANDIDATE = np.dtype("int32, float32, float32")  # of llama.cpp: id, logit, probability


class SchemaGrammar:
    """Grammar of one answer, which is JSON of a schema.

    Args:
        vocabulary: llama.cpp's.
        budget: has the tags of a thought; those of one token each may not come in a text.
        forbidden_ids: may not come anywhere.

    Raises:
        UsageError: the schema is malformed, too large, or has what no grammar keeps.
    """

    def __init__(
        self,
        vocabulary: Any,
        schema: Json,
        budget: ThinkingBudget | None,
        forbidden_ids: set[int],
    ) -> None:
        try:
            if len(str(schema)) > _MAX_CHARACTERS:
                raise ValueError(f"it has more than {_MAX_CHARACTERS:,} characters")
            grammar = f"{_RULES}{_write(schema, schema)}".encode()
            self._sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, grammar, b"root")
            if not self._sampler:
                raise ValueError("llama.cpp cannot read it")
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise UsageError(
                "schema-not-supported",
                f"the JSON schema has no grammar here: {error!s:.200}",
                remedy="leave it out; docs/run.md lists what a schema may have",
            ) from error

        tags = [*budget.open_ids, *budget.close_ids] if budget else []
        self._forbidden = [*forbidden_ids, *(tags if len(tags) == 2 else ())]
        weakref.finalize(self, llama_cpp.llama_sampler_free, self._sampler)

    def allows(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which ids may come next."""
        candidates = np.zeros(ids.size, _CANDIDATE)
        candidates["f0"] = ids
        data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(data=data, size=ids.size)

        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))
        allowed: NDArray[np.bool_] = np.isfinite(candidates["f1"])
        return allowed & ~np.isin(ids, self._forbidden)

    def accept(self, token: int) -> None:
        """Move past an allowed token."""
        llama_cpp.llama_sampler_accept(self._sampler, token)


def _write(schema: Json, base: Json, parents: Sequence[str] = ()) -> str:
    """Return the rule of a schema; ValueError for what it would not keep.

    Args:
        base: where references begin: the whole schema, or the last one with an ``$id``.
        parents: references that the schema is within.
    """
    base = schema if "$id" in schema else base
    left = {key: value for key, value in schema.items() if key not in _NOTES.split()}
    kind = left.pop("type", "value")
    alternatives = left.pop("anyOf", None)

    if isinstance(kind, list):
        alternatives = [{**left, "type": each} for each in kind]
        left = {}
    if reference := left.pop("$ref", None):
        if reference in parents:
            raise ValueError(f"{reference} is within itself")
        parents = [*parents, reference]
        alternatives = [reduce(getitem, reference.removeprefix("#/").split("/"), base)]

    write = partial(_write, base=base, parents=parents)
    if alternatives:
        rule = " | ".join(map(write, alternatives))
    elif "enum" in left or "const" in left:
        values = left.pop("enum", None) or [left.pop("const")]
        rule = " | ".join(f"{_quote(_quote(value))} space" for value in values)
    elif "properties" in left:
        rule = _write_object(left, write)
    elif kind == "array":
        item = write(left.pop("items", {}))
        rule = f'"[" space ({item} ("," space {item})*)? "]" space'
    elif kind in _KINDS.split():
        rule = kind
    else:
        raise ValueError(f"type {kind!r}")

    if left:
        raise ValueError(f"{min(left)!r} is not supported")
    if len(rule) > _MAX_RULE_CHARACTERS:
        raise ValueError(f"its rule has more than {_MAX_RULE_CHARACTERS:,} characters")
    return f"({rule})"


def _write_object(left: Json, write: Callable[[Json], str]) -> str:
    """Return an object's rule: required members, then optional ones; all, if none is required."""
    left.pop("additionalProperties", None)  # without others, both of its values are kept
    pairs = {
        name: f'{_quote(_quote(name))} space ":" space {write(value)}'
        for name, value in left.pop("properties").items()
    }
    required = left.pop("required", None) or list(pairs)

    members = ' "," space '.join(pairs[name] for name in required)
    optional = ""
    for name, pair in pairs.items():
        if name not in required:
            optional += f' ("," space {pair})?'
    return f'"{{" space {members}{optional} "}}" space'


def _quote(value: object) -> str:
    """Return a value in JSON, which also quotes a text in GBNF."""
    return json.dumps(value, ensure_ascii=False)

"""Sandboxed process: ``python -m racdeploy.sandbox.worker MODULE MEMORY FILES``.

``MODULE`` has ``OPERATIONS``: each gets the values of a request and returns those of the answer,
bytes under ``payload``; an exception is an answer too. ``MEMORY`` is in bytes, ``FILES`` is 1 where
operations open files. A first, empty answer follows the import of the module; the process ends with
its stdin.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping

from racdeploy.errors import RacdeployError
from racdeploy.processes.messages import (
    Header,
    describe_error,
    read_message,
    reserve_pipes,
    write_message,
)
from racdeploy.sandbox.limits import confine, limit_cpu_time

Operations = Mapping[str, Callable[[Header], Header]]

_MAX_REASON_CHARACTERS = 2000


def main() -> None:
    """Answer requests until stdin ends."""
    requests, answers = reserve_pipes()
    module, memory_bytes, opens_files = sys.argv[1:]
    operations: Operations = importlib.import_module(module).OPERATIONS
    confine(int(memory_bytes), opens_files == "1")
    write_message(answers, {})

    while (request := read_message(requests)) is not None:
        header, payload = request
        answer = _carry_out(operations, {**header, "payload": payload})
        data = answer.pop("payload", b"")
        write_message(answers, answer, data)
    os._exit(0)  # at once: there is nothing to save


def _carry_out(operations: Operations, request: Header) -> Header:
    try:
        limit_cpu_time(request["seconds"])
        return operations[request["op"]](request)
    except RacdeployError as error:
        return describe_error(error)
    except MemoryError:
        return {"failed": "it needed more memory than its process may use"}
    except BaseException as error:  # noqa: BLE001 - a native panic is no Exception
        kind = type(error).__name__
        reason = f"{kind}: {error}" if str(error) else kind
        return {"failed": reason[:_MAX_REASON_CHARACTERS]}
    finally:
        limit_cpu_time(0)


if __name__ == "__main__":
    main()

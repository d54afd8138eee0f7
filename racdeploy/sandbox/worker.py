"""The process that computes: ``python -m racdeploy.sandbox.worker MODULE MEMORY FILES``.

``MODULE`` has ``OPERATIONS``: each gets a request's header and payload and returns the answer's.
Whatever one raises is an answer too. ``MEMORY`` is in bytes, ``FILES`` is 1 where operations open
files. The first answer, to no request, says that the module is imported; it ends with its stdin.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping

from racdeploy.errors import RacdeployError
from racdeploy.processes.messages import Header, Message, read_message, write_message
from racdeploy.sandbox.limits import confine, limit_processor

Operations = Mapping[str, Callable[[Header, bytes], Message]]

_LONGEST_REASON = 2000  # characters


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    module = sys.argv[1]
    memory_bytes = int(sys.argv[2])
    opens_files = sys.argv[3] == "1"
    operations: Operations = importlib.import_module(module).OPERATIONS
    confine(memory_bytes, opens_files)
    write_message(answers, {})

    while (request := read_message(requests)) is not None:
        write_message(answers, *_carry_out(operations, *request))
    os._exit(0)  # nothing here is worth the time of an orderly end


def _carry_out(operations: Operations, header: Header, payload: bytes) -> Message:
    try:
        limit_processor(header["seconds"])
        return operations[header["op"]](header, payload)
    except RacdeployError as error:
        name = type(error).__name__
        return {
            "raised": name,
            "code": error.code,
            "message": error.message,
            "remedy": error.remedy,
        }, b""
    except MemoryError:
        return {"failed": "it took more memory than its process may"}, b""
    except BaseException as error:  # noqa: BLE001 - a native library's panic is none of Exception
        if str(error):
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = type(error).__name__
        return {"failed": reason[:_LONGEST_REASON]}, b""
    finally:
        limit_processor(0)


if __name__ == "__main__":
    main()

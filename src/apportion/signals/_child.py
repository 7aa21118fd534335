"""Run as a script by `Worker`: calls one function, request after request, in a process that may be killed.

Standard library only, so that it starts at once and holds little memory. Requests come pickled from the parent, which
is trusted; replies go back as JSON, because what a function read from a model is not. Both are preceded by their length.
"""

import importlib
import importlib.util
import json
import os
import pickle
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from typing import Any

HEADER = struct.Struct(">Q")
_LONGEST_TRACE = 20_000


def serve() -> None:
    """Answer until the parent closes the pipe. What the function prints goes nowhere."""
    requests, replies = os.dup(0), os.dup(1)
    for fd in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    setup = _read(requests)
    try:
        sys.path[:] = setup["path"]
        function = _load(setup["target"])
        _limit_memory(setup["memory"])
    except BaseException as error:
        _write(replies, _encoded("raised", f"{type(error).__name__}: {error}"))
        return
    _write(replies, _encoded("ok", None))
    while (request := _read(requests)) is not None:
        arguments, seconds = request
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)  # SIGALRM ends an orphan that hangs
        reply = _answer(function, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, reply)


def _answer(function: Callable[..., Any], arguments: Any) -> bytes:
    try:
        return _encoded("ok", function(*arguments))
    except MemoryError:
        return _encoded("memory", None)
    except BaseException as error:
        trace = "".join(traceback.format_tb(error.__traceback__))[-_LONGEST_TRACE:]
        return _encoded("raised", f"{type(error).__name__}: {str(error)[:500]}", trace)


def _encoded(status: str, value: Any, trace: str = "") -> bytes:
    return json.dumps({"status": status, "value": value, "trace": trace}, default=float).encode()


def _load(target: str) -> Callable[..., Any]:
    """`module:function` (or `module:object.method`) or `/path/to/file.py:function`."""
    where, _, name = target.rpartition(":")
    if not where.endswith(".py"):
        return reduce(getattr, name.split("."), importlib.import_module(where))  # type: ignore[return-value]
    spec = importlib.util.spec_from_file_location("target", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def _limit_memory(extra: int) -> None:
    """Address space may grow by this much beyond what the imports took."""
    now = 0
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, now + extra))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(fd: int) -> Any:
    head = _exactly(fd, HEADER.size)
    if head is None:
        return None
    body = _exactly(fd, HEADER.unpack(head)[0])
    return None if body is None else pickle.loads(body)


def _exactly(fd: int, size: int) -> bytes | None:
    parts = []
    while size and (part := os.read(fd, size)):
        parts.append(part)
        size -= len(part)
    return None if size else b"".join(parts)


def _write(fd: int, data: bytes) -> None:
    data = HEADER.pack(len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    serve()

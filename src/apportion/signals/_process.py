"""A function in a process of its own that is killed when it takes too long, too much memory or says too much."""

import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apportion.signals._child import HEADER

Status = Literal["ok", "raised", "time", "memory", "output", "died"]
START_SECONDS = 120.0


@dataclass(frozen=True)
class Reply:
    """How a call ended, and its value where `status` is "ok"; where it is "raised", the error's text and its traceback."""

    status: Status
    value: Any = None
    trace: str = ""


class Worker:
    """Calls one function in a persistent process. POSIX only. Works from any thread; calls wait for each other.

    The process starts with the first call, and again after it was killed. Its prints go nowhere. It ends with this
    object or with the interpreter; if the interpreter is killed, it ends by itself within `seconds` + 1.

    Args:
        target: `module:function`, or `/path/to/file.py:function` (which spares the imports of a package). Arguments
            must be picklable, the value must fit into JSON.
        seconds: wall-clock limit of one call; starting is not counted. May be changed between calls.
        memory: bytes of address space that calls may add to what the imports took.
        output: largest reply in bytes.

    Attributes:
        counts: how many calls ended with each status.
    """

    def __init__(self, target: str, *, seconds: float = 5.0, memory: int = 1 << 29, output: int = 1 << 20) -> None:
        self.target, self.seconds, self.memory, self.output = target, seconds, memory, output
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Reply:
        """Call the function.

        Raises:
            RuntimeError: the process cannot start, or the function cannot be imported there.
        """
        with self._lock:
            process = self._running()
            seconds = self.seconds
            reply = self._send(process, (arguments, seconds), seconds)
            if reply.status not in ("ok", "raised"):
                self._stop()
            self.counts[reply.status] += 1
            return reply

    def start(self) -> None:
        """Start the process now, so that a function that cannot be imported is found now.

        Raises:
            RuntimeError: as a call.
        """
        with self._lock:
            self._running()

    def close(self) -> None:
        """Kill the process, if there is one; a later call starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        child = Path(__file__).with_name("_child.py")
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(child)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._end = weakref.finalize(self, _kill, process)
        setup = {"path": sys.path, "target": self.target, "memory": self.memory}
        reply = self._send(process, setup, START_SECONDS)
        if reply.status != "ok":
            self._stop()
            raise RuntimeError(f"cannot start a process for {self.target}: {reply.value or reply.status}.")
        return process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _send(self, process: "subprocess.Popen[bytes]", request: Any, seconds: float) -> Reply:
        assert process.stdin is not None
        data = pickle.dumps(request)
        data = HEADER.pack(len(data)) + data
        try:
            while data:
                data = data[process.stdin.write(data) :]
        except BrokenPipeError:
            return Reply("died")
        return self._receive(process, time.monotonic() + seconds)

    def _receive(self, process: "subprocess.Popen[bytes]", deadline: float) -> Reply:
        head = _exactly(process, HEADER.size, deadline)
        if isinstance(head, Reply):
            return head
        size = HEADER.unpack(head)[0]
        if size > self.output:
            return Reply("output")
        body = _exactly(process, size, deadline)
        return body if isinstance(body, Reply) else Reply(**json.loads(body))


def reward_of(reply: Reply) -> float:
    """The reward of a verifier's call: its value; 0 where the answer broke a limit or the verifier; NaN if it died.

    A hanging or malformed answer is the policy's doing. If it were "not measured", it would leave every statistic, and
    the policy could learn to hide behind it. A process that dies for no known reason has measured nothing.
    """
    if reply.status == "ok":
        return float(reply.value)
    return math.nan if reply.status == "died" else 0.0


def _exactly(process: "subprocess.Popen[bytes]", size: int, deadline: float) -> bytes | Reply:
    """So many bytes of the reply, or why they did not come."""
    assert process.stdout is not None
    fd, parts = process.stdout.fileno(), []
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while size:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return Reply("time")
        part = os.read(fd, size)
        if not part:
            return Reply("died")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and its children, and reap it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()

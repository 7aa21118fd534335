"""Calls of functions that may raise or hang: in a thread, in an event loop, or in a process that can be killed.

A call that gives no value gives a `Failure`, which says why; nothing here raises for what a function does.
"""

import asyncio
import inspect
import os
import re
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import cache, cached_property, partial, reduce
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any

from apportion import signals
from apportion.tasks import Problem

AT_ONCE = 64
"""Async calls that run at the same time; the limit of a call counts from its own beginning."""
_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+)')
_OURS = f"{Path(signals.__file__).parents[1]}{os.sep}"


@dataclass(frozen=True)
class Failure:
    """Why a call gave no value, to be read after the name of what was called, and the exception if there was one."""

    reason: str
    cause: BaseException | None = None


class RemoteError(Exception):
    """An exception in another process; its text is the traceback there."""


@dataclass(frozen=True)
class NamedFunction:
    """A function named by text, which runs in a process of its own that is killed when it takes too long.

    It runs in that process's main thread, so it may use signals; what it prints goes nowhere. A `Problem` among its
    arguments arrives as `Problem.plain()`, so that the process need not import us.

    Args:
        target: `module:function`, found on the Python path of this process.
        memory: bytes of address space that calls may add to what the imports took.
    """

    target: str
    memory: int = field(default=8 << 30, repr=False)

    @property
    def name(self) -> str:
        """The function's own name."""
        return re.split(r"[:.]", self.target)[-1]

    def imported(self) -> Any:
        """The function itself, in this process."""
        module, _, path = self.target.partition(":")
        return reduce(getattr, path.split("."), import_module(module))

    @cached_property
    def worker(self) -> signals.Worker:
        """The process, which starts with the first call."""
        return signals.Worker(self.target, memory=self.memory)

    def check(self) -> None:
        """Start the process, so that a function that cannot be imported there is found now."""
        self.worker.start()

    def ask(self, arguments: Sequence[Any], seconds: float) -> Any:
        """What the function returns, or a `Failure`."""
        self.worker.seconds = seconds
        try:
            reply = self.worker(*(x.plain() if isinstance(x, Problem) else x for x in arguments))
        except Exception as error:  # arguments that cannot be sent
            return _raised(error)
        if reply.status == "ok":
            return reply.value
        if reply.status == "raised":
            return Failure(f"raised {reply.value}{_place(reply.trace)}", RemoteError(f"\n{reply.trace}{reply.value}"))
        reasons = {"time": _late(seconds), "memory": "took too much memory", "output": "returned too much"}
        return Failure(reasons.get(reply.status, "ended its process"))


def named(target: str) -> Any:
    """What `module:function` names, imported: itself if it is async or an object, else a `NamedFunction`."""
    found = NamedFunction(target).imported()
    return NamedFunction(target) if inspect.isfunction(found) and not is_async(found) else found


def is_async(function: Any) -> bool:
    """Whether a call of it must be awaited."""
    if inspect.iscoroutinefunction(function):
        return True
    return callable(function) and inspect.iscoroutinefunction(type(function).__call__)


def ask(function: Any, arguments: Sequence[Sequence[Any]], seconds: float) -> Iterator[Any]:
    """What the function returns for each tuple of arguments, or a `Failure`; each call may take so many seconds.

    - An async function is called for all of them at once, `AT_ONCE` at a time, beginning now.
    - A `NamedFunction` is asked in its process, one call after another, as the answers are fetched.
    - Any other is called likewise in a thread. A call that hangs leaves it behind; one that never lets other threads run,
      as a regular expression does, cannot even be noticed: name it as text.
    """
    if is_async(function):
        loop = _running()
        futures = [loop.begin(partial(function, *each), seconds) for each in arguments]
        return (loop.result(future, seconds) for future in futures)
    if isinstance(function, NamedFunction):
        return (function.ask(each, seconds) for each in arguments)
    return (_called(function, each, seconds) for each in arguments)


def ask_here(function: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """As `ask`, in this thread and without a limit of time: for what has its own."""
    for each in arguments:
        try:
            yield function(*each)
        except Exception as error:
            yield _raised(error)


# ---- a thread ---------------------------------------------------------------------------------------------------------


def begun(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Begin a call in a thread of its own, which does not keep the interpreter alive, as that of an executor would.

    So a call that hangs is left behind: a thread cannot be killed.
    """
    future: Future[Any] = Future()
    Thread(target=_settle, args=(future, function, arguments), daemon=True, name="apportion-call").start()
    return future


def _settle(future: "Future[Any]", function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)


def answered(future: "Future[Any]", seconds: float) -> Any:
    """What the call gave, or a `Failure` if it raised or takes longer."""
    if not wait({future}, timeout=seconds).done:
        return Failure(_late(seconds))
    error = future.exception()
    return future.result() if error is None else _raised(error)


def _called(function: Callable[..., Any], arguments: Sequence[Any], seconds: float) -> Any:
    answer = answered(begun(function, *arguments), seconds)
    if not inspect.isawaitable(answer):
        return answer
    loop = _running()  # a plain function that returns what must be awaited
    return loop.result(loop.begin(lambda: answer, seconds), seconds)


# ---- an event loop ------------------------------------------------------------------------------------------------------


@cache
def _running() -> "_Loop":
    """One loop for all steps: clients of network services belong to the loop in which they were first used."""
    return _Loop()


class _Loop:
    """An event loop in a thread of its own, which lets `AT_ONCE` calls in at a time."""

    def __init__(self) -> None:
        self.loop, self.gate, self.blocked = asyncio.new_event_loop(), asyncio.Semaphore(AT_ONCE), False
        Thread(target=_run, args=(self.loop,), daemon=True, name="apportion-async-rewards").start()

    def begin(self, call: Callable[[], Awaitable[Any]], seconds: float) -> "Future[Any]":
        """Start the call, or let it wait for its turn."""
        return asyncio.run_coroutine_threadsafe(self._within(call, seconds), self.loop)

    def result(self, future: "Future[Any]", seconds: float) -> Any:
        """Wait for a value or a `Failure`, as long as the loop itself answers; one that does not is given up."""
        while not wait({future}, timeout=0 if self.blocked else seconds).done:
            if self.blocked or not self._answers(seconds):
                self.blocked = True
                return Failure(
                    f"got no answer, because it or another async function kept the event loop busy for {seconds:g} s "
                    "(time.sleep, or work without await; make such a function a plain one)"
                )
        return future.result()

    def _answers(self, seconds: float) -> bool:
        pong = Event()
        self.loop.call_soon_threadsafe(pong.set)
        if pong.wait(seconds):
            return True
        self.loop.call_soon_threadsafe(self.loop.stop)
        _running.cache_clear()
        return False

    async def _within(self, call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
        """Its value, or a `Failure`. What is late is cancelled, but not waited for: it may refuse."""
        async with self.gate:
            task = asyncio.ensure_future(_caught(call))
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if done:
                return task.result()
            task.cancel()
            return Failure(_late(seconds))


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Until the loop is stopped, and then in an orderly way to its end."""
    loop.run_forever()
    if tasks := asyncio.all_tasks(loop):
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
    loop.close()


async def _caught(call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await call()
    except asyncio.CancelledError:
        return Failure("was cancelled")
    except BaseException as error:  # SystemExit too, which would end the loop
        return _raised(error)


# ---- names ---------------------------------------------------------------------------------------------------------------


def name_of(function: Any) -> str:
    """What a reward calls itself, else the function's own name (of a partial one, the whole one's), else its class."""
    function = getattr(function, "func", function)
    own = getattr(function, "name", None) or getattr(function, "__name__", None)
    return str(own or type(function).__name__)


def shown(function: Any) -> str:
    """The same text in every process: `module:function`, the object's own expression, or its class."""
    if isinstance(function, NamedFunction):
        return function.target
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}:{function.__qualname__}"
    return (
        repr(function)
        if " at 0x" not in repr(function)
        else f"{type(function).__module__}:{type(function).__qualname__}"
    )


# ---- what is told -------------------------------------------------------------------------------------------------------


def _late(seconds: float) -> str:
    return f"took longer than {seconds:g} s"


def _raised(error: BaseException) -> Failure:
    trace = "".join(traceback.format_tb(error.__traceback__))
    return Failure(f"raised {type(error).__name__}: {str(error)[:500]}{_place(trace)}", error)


def _place(trace: str) -> str:
    """The first line of the traceback that is not of this library."""
    frames = [m for m in _FRAME.finditer(trace) if not m["file"].startswith(_OURS)]
    return f" ({frames[0]['file']}:{frames[0]['line']})" if frames else ""

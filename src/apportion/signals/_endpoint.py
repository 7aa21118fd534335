"""Many chat completions from one OpenAI-compatible server: at most so many at once, patiently, within a budget."""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

MAX_BYTES = 4 << 20
"""A body larger than this is given up."""
MAX_WAIT = 60.0
"""Longest pause before a retry, in seconds, whatever the server asks for."""
_AGAIN = frozenset({408, 409, 425, 429})


@dataclass
class Reply:
    """What came of one request: a text, or the problem there was."""

    text: str | None = None
    problem: str = ""
    skipped: bool = False
    """The budget of calls or of time was used up."""
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Budget:
    """Calls and seconds that may still be spent."""

    calls: float = math.inf
    seconds: float = math.inf
    end: float = field(init=False)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self.end - time.monotonic())

    def take(self) -> bool:
        """Use one call, if there is one."""
        if self.calls < 1 or not self.left():
            return False
        self.calls -= 1
        return True


class _Broken(Exception):
    """A body that is no chat completion."""

    def __init__(self, problem: str, again: bool = True) -> None:
        super().__init__(problem)
        self.again = again


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    A request is repeated after 408, 409, 425, 429 and 5xx, after a lost connection, a time-out and a broken body; the
    pause is `Retry-After` if the server sends it, else 0.5 s doubled each time, times a random factor in [0.5, 1.5].
    """

    base_url: str
    api_key: str = field(repr=False)
    concurrency: int
    retries: int
    timeout: float

    def ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        budget: Budget,
        keep: Callable[[int, str], None] = lambda i, text: None,
    ) -> list[Reply]:
        """One reply per body, in order; `keep(i, text)` is called as soon as reply i is there."""
        return _finish(self._all(bodies, budget, keep))

    async def _all(
        self, bodies: Sequence[Mapping[str, Any]], budget: Budget, keep: Callable[[int, str], None]
    ) -> list[Reply]:
        from openai import AsyncOpenAI

        gate = asyncio.Semaphore(self.concurrency)

        async def one(i: int) -> Reply:
            async with gate:
                reply = await self._patiently(client, bodies[i], budget)
            if reply.text is not None:
                keep(i, reply.text)
            return reply

        async with AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0) as client:
            return await asyncio.gather(*(one(i) for i in range(len(bodies))))

    async def _patiently(self, client: Any, body: Mapping[str, Any], budget: Budget) -> Reply:
        reply = Reply()
        while True:
            if not budget.take():
                reply.skipped, reply.problem = True, reply.problem or "the budget is used up"
                return reply
            reply.calls += 1
            wait = await self._once(client, body, budget, reply)
            if wait is None or reply.calls > self.retries:
                return reply
            await asyncio.sleep(min(wait, budget.left()))

    async def _once(self, client: Any, body: Mapping[str, Any], budget: Budget, reply: Reply) -> float | None:
        """Fill the reply; how long to wait before asking again, None if that is not needed or no use."""
        from openai import APIConnectionError, APIStatusError

        pause: float = 0.5 * 2.0 ** (reply.calls - 1) * random.Random().uniform(0.5, 1.5)
        try:
            async with asyncio.timeout(min(self.timeout, budget.left())):
                _fill(reply, await _post(client, body))
            return None
        except APIStatusError as error:
            reply.problem = f"HTTP {error.status_code}: {_short(error.message)}"
            if error.status_code not in _AGAIN and error.status_code < 500:
                return None
            pause = _retry_after(error.response.headers.get("retry-after"), pause)
        except APIConnectionError as error:
            reply.problem = f"no connection: {_short(error.__cause__ or error)}"
        except TimeoutError:
            reply.problem = f"no complete reply within {self.timeout:g} s"
        except _Broken as error:
            reply.problem = str(error)
            if not error.again:
                return None
        return min(pause, MAX_WAIT)


def _finish(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """Run to the end, also where an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def _post(client: Any, body: Mapping[str, Any]) -> Any:
    """The decoded body of the answer, read piece by piece so that a huge one is given up early."""
    data = bytearray()
    async with client.chat.completions.with_streaming_response.create(**body) as response:
        try:
            async for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_BYTES:
                    break
        except Exception as error:  # whatever the HTTP library raises when the connection is lost in mid-body
            raise _Broken(f"the connection was lost in the middle of a reply: {_short(error)}") from error
    if len(data) > MAX_BYTES:
        raise _Broken(f"a reply of more than {MAX_BYTES >> 20} MiB", again=False)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Broken(f"the server's answer is not JSON: {_short(bytes(data[:80]))}") from error


def _fill(reply: Reply, body: Any) -> None:
    try:
        text = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise _Broken(f"the server's answer is no chat completion: {_short(body)}") from error
    usage = body.get("usage")
    for name in ("prompt_tokens", "completion_tokens"):
        count = usage.get(name) if isinstance(usage, dict) else None
        setattr(reply, name, count if isinstance(count, int) else 0)
    reply.text, reply.problem = text if isinstance(text, str) else "", ""


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        seconds = float(header or "")
    except ValueError:
        return otherwise
    return seconds if seconds >= 0 else otherwise


def _short(x: object) -> str:
    text = " ".join(str(x).split())
    return text if len(text) <= 200 else text[:200] + "..."

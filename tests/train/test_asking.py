"""Calls in a thread, a loop and a process: how many at once, what a limit counts, what stays behind."""

import asyncio
import threading
import time
from types import MappingProxyType

import pytest

from apportion.tasks import Problem
from apportion.train.asking import AT_ONCE, Failure, NamedFunction, ask, ask_here


def test_async_calls_beyond_the_limit_wait_for_their_turn_and_their_time_counts_from_it():
    running, most = [0], [0]

    async def call(x):
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.3)
        running[0] -= 1
        return x

    count = 3 * AT_ONCE  # three turns of 0.3 s, each within 0.8 s, together not
    assert list(ask(call, [(x,) for x in range(count)], 0.8)) == list(range(count))
    assert most[0] == AT_ONCE


def test_plain_calls_are_made_as_they_are_fetched_in_threads():
    seen = []

    def call(x):
        seen.append((x, threading.get_ident()))
        return x

    answers = ask(call, [(1,), (2,), (3,)], 1.0)
    assert [next(answers), next(answers)] == [1, 2]
    assert [x for x, _ in seen] == [1, 2]
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_no_thread_stays_once_its_call_is_over():
    def threads():
        return {t for t in threading.enumerate() if t.name == "apportion-call"} - before

    before = set()
    before = threads()
    answers = list(ask(time.sleep, [(1.0,), (0.0,)], 0.3))
    assert answers == [Failure("took longer than 0.3 s"), None]
    late = threads()
    assert late  # the late one, until it ends
    for thread in late:
        thread.join(timeout=10)
    assert not threads()


def leave():
    raise SystemExit(3)


async def leave_async():
    leave()


def test_a_function_that_exits_does_not_take_us_along():
    for function in (leave, leave_async):
        (failure,) = ask(function, [()], 1.0)
        assert failure.reason.startswith("raised SystemExit: 3 (")
    assert next(ask(leave_async, [()], 1.0)).reason.startswith("raised SystemExit")  # the loop lives


def test_what_cannot_be_sent_to_a_process_is_a_failure():
    call = NamedFunction("operator:is_")
    problem = Problem("a", "q", "q", "a", data={"lock": threading.Lock()})
    (failure,) = ask(call, [(problem, "text")], 1.0)
    assert failure.reason.startswith("raised TypeError: cannot pickle '_thread.lock' object")
    assert list(ask(call, [(1, 1)], 1.0)) == [True]
    call.worker.close()


def test_a_process_that_dies_is_a_failure_and_the_next_call_has_another():
    call = NamedFunction("os:_exit")
    assert [x.reason for x in ask(call, [(1,), (1,)], 5.0)] == ["ended its process"] * 2


def test_a_limit_raised_after_the_process_started_is_the_one_that_counts():
    call = NamedFunction("time:sleep")
    call.worker.seconds = 0.1
    call.check()
    assert list(ask(call, [(1.5,)], 10.0)) == [None]
    (late,) = ask(call, [(1.5,)], 0.2)
    assert late.reason == "took longer than 0.2 s"
    call.worker.close()


@pytest.mark.parametrize("text", ["nul \0", "a lone surrogate \ud800", "\N{GRINNING FACE}\u2028\r\n", "x" * 500_000])
def test_any_text_reaches_a_process_and_comes_back(text):
    call = NamedFunction("builtins:getattr")
    problem = Problem("a", text, "", "", data=MappingProxyType({"key": text}))
    assert list(ask(call, [(problem, "question"), (problem, "data")], 10.0)) == [text, {"key": text}]
    call.worker.close()


def test_a_text_that_is_too_long_to_come_back_is_a_failure():
    call = NamedFunction("builtins:str.upper")
    assert [x.reason for x in ask(call, [("x" * 3_000_000,)], 10.0)] == ["returned too much"]
    call.worker.close()


def test_here_is_this_thread():
    assert list(ask_here(threading.get_ident, [()])) == [threading.get_ident()]

import math
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest

from apportion.signals import (
    SymbolicVerifier,
    Worker,
    last_number,
    numeric_answer,
    read_number,
    reward_of,
    symbolic_answer,
)

# ---- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7+5=12\n12-3=9", 9),
        ("She pays $1,009.50.", Fraction(2019, 2)),
        ("1,234,567", 1234567),
        ("1, 2, 3", 3),
        ("1,2345", 2345),
        ("the result is -5", -5),
        ("the result is −5", -5),  # Unicode minus
        ("so 9-5", 5),  # a subtraction
        ("x=-5", -5),
        ("(3)-4", 4),
        (".5", Fraction(1, 2)),
        ("12/60", Fraction(1, 5)),
        ("50%", 50),
        ("12 of 30\n#### 12 of 30", 12),  # the first number after the mark
        ("#### 1\n#### 2", 2),
        (r"so \boxed{42} of 50", 42),
        (r"\boxed{1} or \boxed{\text{about } {7}}", 7),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{5", 5),
        ("no number", None),
        ("12\n#### none", None),  # a mark without a number is no answer
        ("7/0", None),
        ("", None),
    ],
)
def test_the_number_a_text_gives(text, expected):
    assert read_number(text) == expected


def test_the_last_number_ignores_marks():
    assert last_number("#### 3\n4") == 4
    assert last_number(r"\boxed{3} 4") == 4


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("18", "18", 1.0),
        ("18.00", "18", 1.0),
        ("0.5", "1/2", 1.0),
        ("1,000", "1000", 1.0),
        ("0.33", "1/3", 0.0),
        ("18.01", "18", 0.0),
        ("", "18", 0.0),
        (" \n", "18", 0.0),
        ("none", "0", 0.0),
    ],
)
def test_numeric_answer(text, gold, reward):
    assert numeric_answer(text, gold) == reward


def test_numeric_tolerance_is_inclusive():
    # ReFT: right if the absolute error is at most 0.01
    assert numeric_answer("41.99", "42", tolerance=0.01) == 1
    assert numeric_answer("41.98", "42", tolerance=0.01) == 0


def test_a_gold_answer_without_a_number():
    with pytest.raises(ValueError, match="numeric_answer needs a number as gold answer; got 'blue'"):
        numeric_answer("3", "blue")


@pytest.mark.parametrize("text", ["1" * 10**6, "1," * 10**5, "111," * 10**5 + "11", "-" * 10**5, r"\boxed{" * 10**5])
def test_hostile_texts_are_read_in_no_time(text):
    started = time.monotonic()
    read_number(text)
    assert time.monotonic() - started < 5


# ---- symbols ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def symbolic():
    verifier = SymbolicVerifier(seconds=2.0)
    verifier("1", "1")
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        (r"The answer is $\frac{1}{2}$.", "0.5", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{x^2+2x}", "(x+1)^2", 0.0),
        ("#### 18", "18", 1.0),
        ("17", "18", 0.0),
        ("", "18", 0.0),
        ("I do not know", "18", 0.0),
    ],
)
def test_symbolic_answer(symbolic, text, gold, reward):
    assert symbolic(text, gold) == reward


@pytest.mark.parametrize("gold", ["18", "-3.5", r"\frac{3}{4}", "(x+1)^2", r"\sqrt{2}", r"\{1, 2\}", "x=4"])
def test_symbolic_accepts_its_own_gold_answer(symbolic, gold):
    assert symbolic(f"${gold}$", gold) == 1


def test_symbolic_survives_an_answer_that_never_ends(symbolic):
    before = symbolic.counts["time"] + symbolic.counts["memory"]
    assert symbolic(r"\boxed{9^{9^{9^{9}}}}", "4") == 0
    assert symbolic.counts["time"] + symbolic.counts["memory"] == before + 1
    assert symbolic("4", "4") == 1


def test_symbolic_works_off_the_main_thread(symbolic):
    out = []
    threads = [threading.Thread(target=lambda n=n: out.append(symbolic(f"${n}$", "3"))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(out) == [0.0] * 5 + [1.0]


def test_symbolic_says_what_is_wrong_with_a_gold_answer(symbolic):
    with pytest.raises(ValueError, match="gold answer that math-verify can read; got ''"):
        symbolic("3", "")


def test_the_shared_symbolic_verifier():
    assert symbolic_answer("so $1/2$", "0.5") == 1


# ---- the process --------------------------------------------------------------------------------------------------------

HOSTILE = """
import os, signal, time

def echo(x): return x
def spin():
    while True: pass
def sleep(): time.sleep(1000)
def spin_in_c(): return 9 ** 9 ** 9
def bomb():
    pile = []
    while True: pile.append(bytearray(1 << 26))
def talk(): return "x" * (1 << 22)
def shout(): print("x" * (1 << 22)); return 1
def fail(): raise KeyError("nothing here")
def leave(): os._exit(3)
def end(): os.kill(os.getpid(), signal.SIGKILL)
def quit(): raise SystemExit(0)
def family():
    import subprocess
    child = subprocess.Popen(["sleep", "1000"])
    open(os.environ["FAMILY"], "w").write(str(child.pid))
    time.sleep(1000)
def me(): return os.getpid()
def call(name, *args): return globals()[name](*args)
"""


@pytest.fixture
def hostile(tmp_path):
    file = tmp_path / "hostile.py"
    file.write_text(HOSTILE)
    return f"{file}:call"


@pytest.fixture
def worker(hostile):
    made = Worker(hostile, seconds=1.0, memory=1 << 28)
    yield made
    made.close()


def alive(pid):
    """Running or zombie: a reaped process has no entry."""
    return os.path.exists(f"/proc/{pid}")


def gone(pid, seconds=5.0):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_one_process_serves_many_calls(worker):
    first = worker("me").value
    assert [worker("echo", x).value for x in (1, "a", None, [1.5])] == [1, "a", None, [1.5]]
    assert worker("me").value == first != os.getpid()
    assert worker.counts == {"ok": 6}


@pytest.mark.parametrize("name", ["spin", "sleep", "spin_in_c"])
def test_a_hang_is_killed_and_leaves_no_zombie(worker, name):
    pid = worker("me").value
    started = time.monotonic()
    reply = worker(name)
    assert reply.status == "time"
    assert 0.9 < time.monotonic() - started < 5
    assert not alive(pid)  # killed and reaped
    assert worker("echo", 1).value == 1  # a new one answers
    assert reward_of(reply) == 0
    assert worker.counts["time"] == 1


def test_a_memory_bomb_meets_its_limit(hostile):
    worker = Worker(hostile, seconds=30.0, memory=1 << 28)
    pid = worker("me").value
    reply = worker("bomb")
    assert reply.status == "memory"
    assert reward_of(reply) == 0
    assert not alive(pid)
    assert worker("echo", 1).value == 1
    worker.close()


def test_a_huge_reply_is_not_read(worker):
    assert worker("talk").status == "output"
    assert worker("shout").value == 1  # what is printed goes nowhere


@pytest.mark.parametrize("name", ["leave", "end"])
def test_a_process_that_dies_has_measured_nothing(worker, name):
    pid = worker("me").value
    reply = worker(name)
    assert reply.status == "died"
    assert math.isnan(reward_of(reply))
    assert not alive(pid)
    assert worker("echo", 1).value == 1


@pytest.mark.parametrize("name", ["fail", "quit"])
def test_an_error_is_a_wrong_answer_and_the_process_goes_on(worker, name):
    pid = worker("me").value
    reply = worker(name)
    assert reply.status == "raised"
    assert reward_of(reply) == 0
    assert worker("me").value == pid


def test_a_value_that_is_not_json_is_an_error(worker):
    assert worker("echo", {1, 2}).status == "raised"
    assert worker("echo", 1).value == 1


def test_children_die_with_it(worker, tmp_path, monkeypatch):
    monkeypatch.setenv("FAMILY", str(tmp_path / "pid"))
    assert worker("family").status == "time"
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_process_killed_between_calls_is_replaced(worker):
    pid = worker("me").value
    os.kill(pid, 9)
    time.sleep(0.1)
    assert worker("echo", 1).value == 1


def test_threads_share_it(worker):
    out = []
    threads = [threading.Thread(target=lambda n=n: out.append(worker("echo", n).value)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(out) == list(range(20))


def test_it_ends_with_its_owner(worker):
    pid = worker("me").value
    worker.close()
    assert not alive(pid)


def test_a_target_that_cannot_be_imported():
    with pytest.raises(RuntimeError, match="cannot start a process for no_such_module:f: ModuleNotFoundError"):
        Worker("no_such_module:f")()


def test_a_hung_process_outlives_a_killed_interpreter_by_little(hostile):
    script = (
        "import sys, threading, time\nfrom apportion.signals import Worker\n"
        f"w = Worker({hostile!r}, seconds=1.0)\n"
        "print(w('me').value, flush=True)\n"
        "w('spin_in_c')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid, 6.0)

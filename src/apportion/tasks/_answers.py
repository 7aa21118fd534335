"""Ways to verify an answer: as a number, as text, as mathematics, as a choice, or by the user's own function."""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from apportion.signals import Worker, marked_answer, numeric_answer, read_number, symbolic_answer
from apportion.tasks._core import Problem
from apportion.tasks._names import is_own, nearest

TOLERANCE = 1e-4
"""Published answers such as 0.6666666667 are rounded."""
Verifier = Callable[[Problem, str], float]

_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_ALONE = re.compile(r"(?<![^\W_])([A-Za-z])(?![^\W_])")
_SAID = re.compile(r"(?i:answer)(?:\s+(?i:is))?[\s:*(]*([A-Z])(?![^\W_])")
_LED = re.compile(r"\W*([A-Z])(?:[.):]|\W*$)")


def verifier_of(verify: str | Verifier | None, seconds: float) -> Verifier:
    """The function `(problem, text) -> reward` that `verify` of `from_data` asks for.

    Raises:
        ValueError: an unknown name (answered with the nearest known one).
    """
    if verify is None:
        return unverified
    if callable(verify):
        return verify
    if is_own(verify):
        return _Own(verify.strip(), seconds)
    if verify not in VERIFIERS:
        raise ValueError(f"there is no verifier {verify!r}.{nearest(verify, VERIFIERS)} Or give module:function.")
    return VERIFIERS[verify]


def number(problem: Problem, text: str) -> float:
    """1 if the response's number is within 0.0001 of the answer."""
    return numeric_answer(text, problem.answer, tolerance=TOLERANCE)


def exact(problem: Problem, text: str) -> float:
    """1 if what the response marks as its answer, or all of it, is the answer, letter by letter."""
    return float(_final(text) == problem.answer)


def math(problem: Problem, text: str) -> float:
    """1 if the response's last answer equals the gold one as mathematics."""
    return symbolic_answer(text, problem.answer)


def choice(problem: Problem, text: str) -> float:
    """1 if the response chooses the letter of the answer."""
    return float(chosen(text) == problem.answer)


VERIFIERS: dict[str, Verifier] = {"choice": choice, "exact": exact, "math": math, "number": number}


def gold(verify: str | Verifier | None, value: Any, where: str) -> str:
    """The gold answer in a column, as the verifier compares it.

    Raises:
        ValueError: it is not what the verifier needs.
    """
    if verify == "number":
        found = gold_number(value)
        if found is None:
            raise ValueError(f"{where} needs a number as its answer; got {value!r}.")
        return plain_number(found)
    if verify == "choice":
        letter = _choice(value)
        if letter is None:
            raise ValueError(
                f"{where} needs a letter, or the place of the choice (0 = A), as its answer; got {value!r}."
            )
        return letter
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if verify in VERIFIERS and not (text := _final(text)):
        raise ValueError(f"{where} needs an answer; got {value!r}.")
    return text


def gold_number(value: Any) -> Fraction | None:
    """The number in a column: a number, or text that is read as `read_number` does; None if there is none."""
    if isinstance(value, str):
        return read_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        return Fraction(str(value))
    except ValueError:  # nan, inf
        return None


def plain_number(value: Fraction) -> str:
    """145/1 as 145, 1/4 as 0.25, 1/3 as 1/3: read again, it is the same number."""
    if value.denominator == 1:
        return str(value)
    try:
        decimal = f"{Decimal(str(float(value))):f}"
    except OverflowError:
        return str(value)
    return decimal if Fraction(decimal) == value else str(value)


def chosen(text: str) -> str | None:
    r"""The letter that a response chooses: in what it marks as its answer (`marked_answer`), else after its last
    "answer" ("The answer is (B)"), else as its first letter, where that stands alone ("B", "(B) Paris").

    Example:
        >>> [chosen(t) for t in ("A or B?\n#### B", "So the answer is (C).", "D. Rome", "A man left.", "\\boxed{b}")]
        ['B', 'C', 'D', None, 'B']
    """
    marked = marked_answer(text)
    if marked is not None:
        found = _ALONE.search(marked)
    else:
        said = list(_SAID.finditer(text))
        found = said[-1] if said else _LED.match(text)
    return found[1].upper() if found else None


def _final(text: str) -> str:
    marked = marked_answer(text)
    return (text if marked is None else marked).strip()


def _choice(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return chr(ord("A") + value) if 0 <= value < 26 else None
    found = _LETTER.fullmatch(_final(value)) if isinstance(value, str) else None
    return found[1].upper() if found else None


def unverified(problem: Problem, text: str) -> float:
    """Nothing is known of the answer: NaN, not measured."""
    return float("nan")


class _Own:
    """The user's `module:function(problem, text) -> reward`, in a process that is killed when it takes too long.

    There the problem is `Problem.plain()`, so that the process need not load this package.
    """

    def __init__(self, target: str, seconds: float) -> None:
        self.__qualname__ = target  # what a task's printed form counts in
        self._worker = Worker(target, seconds=seconds, memory=1 << 30)

    def __call__(self, problem: Problem, text: str) -> float:
        target = self._worker.target
        try:
            reply = self._worker(problem.plain(), text)
        except RuntimeError as error:
            raise ValueError(f"{error} Is it on the Python path?") from None
        if reply.status != "ok":
            told = f" ({reply.value})" if reply.value else ""
            raise ValueError(
                f"{target} gave problem {problem.id} no reward: {reply.status}{told}. The response: {text[:80]!r}."
            )
        if not isinstance(reply.value, int | float):
            raise ValueError(f"{target} must return a number; got {reply.value!r} for problem {problem.id}.")
        return float(reply.value)

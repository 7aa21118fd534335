"""Verifiers: is the answer in this text the right one? 1 = yes, 0 = no, NaN = could not be measured."""

import re
from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path

from apportion.signals._process import Worker, reward_of

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}%])-)?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++)"
    r"(?:/(?P<below>\d++))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MINUS = str.maketrans({"−": "-", "–": "-", "\u2011": "-", "$": None, "\u00a0": " "})
_LONGEST = 400
"""Digits of the longest number that is read."""


def read_number(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer, exactly; None if there is none.

    Looks, in this order, at what follows the last `####` (its first number), into the last `\boxed{...}` (its last
    number), at the whole text (its last number). A mark without a number after it is no answer. Thousands separators,
    decimals, `a/b` and `\frac{a}{b}` of digits are read; a minus right after a digit, letter or closing bracket is a
    subtraction, not a sign; currency and per cent signs are ignored.

    Example:
        >>> read_number("12-3 = 9, so she pays $1,009.50."), read_number("7+5=12\n#### 12 of 30")
        (Fraction(2019, 2), Fraction(12, 1))
    """
    _, mark, after = text.rpartition("####")
    if mark:
        return _first(_numbers(after))
    boxed = _boxed(text)
    return _first(_numbers(text if boxed is None else boxed)[::-1])


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly, whatever marks stand before it; read as in `read_number`."""
    return _first(_numbers(text)[::-1])


def marked_answer(text: str) -> str | None:
    r"""What a text marks as its answer; None without a mark.

    The line that follows the last `####`, else what the last `\boxed{...}` holds, else the last `<answer>...</answer>`. A
    mark that is not closed holds the rest.

    Example:
        >>> marked_answer("so\n#### Rome"), marked_answer(r"it is \boxed{\text{B}}"), marked_answer("Rome")
        ('Rome', '\\text{B}', None)
    """
    _, mark, after = text.rpartition("####")
    if mark:
        return after.strip().partition("\n")[0].strip()
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    _, mark, after = text.rpartition("<answer>")
    return after.partition("</answer>")[0].strip() if mark else None


def stated_answer(text: str, gold: str) -> Fraction | str | None:
    r"""What a text gives as its answer, so that equal answers can be counted; None if it gives none.

    Where the gold answer is a number, the text's number (`read_number`). Else what it marks (`marked_answer`), or the
    whole text, without case and white space.

    Example:
        >>> stated_answer("so x = 1,000.", "12") == stated_answer("#### 1000", "12"), stated_answer("Yes, of course", "no")
        (True, 'yes,ofcourse')
    """
    if _NUMBER.fullmatch(_FRACTION.sub(r"\1/\2", gold.translate(_MINUS)).strip(" %\n")):
        return read_number(text)
    marked = marked_answer(text)
    return "".join((text if marked is None else marked).casefold().split()) or None


def numeric_answer(text: str, gold: str, *, tolerance: float = 0.0) -> float:
    """1 if the text's number (`read_number`) equals the gold one, else 0.

    |answer - gold| <= tolerance, in exact arithmetic: 0.5, .50 and 1/2 are equal, 0.33 and 1/3 are not.

    Source: 2401.08967 uses a tolerance of 0.01.
    Degenerate: no number in the text gives 0.
    Raises: ValueError if there is no number in the gold answer.

    Example:
        >>> numeric_answer("So he has 1,000.0 left.", "1000"), numeric_answer("", "1000")
        (1.0, 0.0)
    """
    target = read_number(gold)
    if target is None:
        raise ValueError(f"numeric_answer needs a number as gold answer; got {gold!r}. Use symbolic_answer.")
    found = read_number(text)
    return float(found is not None and abs(found - target) <= Fraction(str(tolerance)))


class SymbolicVerifier:
    """1 if the text's last mathematical answer equals the gold one as mathematics (math-verify), else 0.

    math-verify may hang or eat memory on what a model writes, so it runs in a process that is killed at its limits. An
    answer that breaks a limit or math-verify itself gets 0; a process that died for no known reason gives NaN.

    Args:
        seconds: limit of one answer. memory: bytes one answer may take.

    Attributes:
        counts: how the calls ended: "ok", "time", "memory", "output", "raised", "died".
    """

    def __init__(self, *, seconds: float = 5.0, memory: int = 1 << 29) -> None:
        self._worker = Worker(f"{Path(__file__).with_name('_mathverify.py')}:agrees", seconds=seconds, memory=memory)

    @property
    def counts(self) -> Counter[str]:
        """How many calls ended with each status."""
        return self._worker.counts

    def __call__(self, text: str, gold: str) -> float:
        """The reward of one answer.

        Raises:
            ValueError: math-verify cannot read the gold answer. RuntimeError: math-verify is not installed.
        """
        if not text.strip():
            return 0.0
        reply = self._worker(text, gold)
        if reply.status == "ok" and reply.value is None:
            raise ValueError(
                f"symbolic_answer needs a gold answer that math-verify can read; got {gold!r}. Write it as LaTeX."
            )
        return reward_of(reply)

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._worker.close()


def symbolic_answer(text: str, gold: str) -> float:
    """`SymbolicVerifier` with its usual limits; one process serves the whole interpreter."""
    return _shared()(text, gold)


@cache
def _shared() -> SymbolicVerifier:
    return SymbolicVerifier()


def _numbers(text: str) -> list[Fraction | None]:
    text = _FRACTION.sub(r"\1/\2", text.translate(_MINUS))
    return [_value(m) for m in _NUMBER.finditer(text)]


def _value(m: re.Match[str]) -> Fraction | None:
    """The number of a match; None if it is too long or divides by zero."""
    if len(m[0]) > _LONGEST:
        return None
    above = Fraction(m["number"].replace(",", ""))
    below = int(m["below"] or 1)
    if not below:
        return None
    return (-above if m["sign"] else above) / below


def _first(numbers: list[Fraction | None]) -> Fraction | None:
    return numbers[0] if numbers else None


def _boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces matched; an unclosed one runs to the end."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return text[start:]

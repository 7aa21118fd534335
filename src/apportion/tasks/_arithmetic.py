"""Arithmetic in several steps, made here: every question has a worked solution that a tool can recompute."""

from collections.abc import Iterator
from fractions import Fraction
from random import Random

from apportion.signals import last_number, lines, tool_judge
from apportion.tasks._core import BasicTask, Problem, draw, problem_id

_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def arithmetic(
    *,
    terms: int = 4,
    digits: int = 1,
    operators: str = "+-",
    negative: bool = False,
    train: int = 4096,
    test: int = 512,
    seed: int = 0,
) -> BasicTask:
    """Arithmetic in several steps, such as 7+5-3+6=?, worked one equation a line: 7+5=12, 12-3=9, 9+6=15.

    The prompt is raw text that ends in a line break. A response is right if its last number is the answer. Questions
    are worked from left to right; where a product follows a sum, parentheses keep that order: `(7+5)*3`. Whether a question belongs to the test is decided by
    its text alone, so no seed and no other setting moves it into the training.

    Args:
        terms: numbers in a question, at least 2. digits: digits of each; none is 0.
        operators: any of `+-*`. negative: whether a result on the way may be below 0.
        train, test: how many problems. seed: which.

    Raises:
        ValueError: a setting is out of range, or there are too few different questions.

    Example:
        >>> task = arithmetic(terms=3, train=2, test=1)
        >>> task.verify(task.train[0], task.train[0].solution)
        1.0
    """
    if terms < 2 or digits < 1:
        raise ValueError(f"arithmetic needs terms of at least 2 and digits of at least 1; got {terms} and {digits}.")
    if not operators or set(operators) - set(_APPLY):
        raise ValueError(f"arithmetic needs operators out of '+-*'; got {operators!r}.")
    stream = _problems(Random(seed), terms, digits, operators, negative)
    name = f"arithmetic(terms={terms}, digits={digits}, operators={operators!r})"
    learn, held = draw(name, stream, train, test)
    judge = tool_judge(chained=True, question_numbers=True)
    return BasicTask("arithmetic", learn, held, _verify, lines(), judge)


def _verify(problem: Problem, text: str) -> float:
    return float(last_number(text) == Fraction(problem.answer))


def _problems(random: Random, terms: int, digits: int, operators: str, negative: bool) -> Iterator[Problem]:
    while True:
        numbers = [random.randrange(10 ** (digits - 1), 10**digits) for _ in range(terms)]
        signs = [random.choice(operators) for _ in range(terms - 1)]
        results = _results(numbers, signs)
        if negative or min(results) >= 0:
            yield _problem(numbers, signs, results)


def _results(numbers: list[int], signs: list[str]) -> list[int]:
    """The value after each step, from left to right."""
    out = numbers[:1]
    for sign, number in zip(signs, numbers[1:], strict=True):
        out.append(_APPLY[sign](out[-1], number))
    return out


def _problem(numbers: list[int], signs: list[str], results: list[int]) -> Problem:
    question = f"{_expression(numbers, signs)}=?"
    steps = zip(results, signs, numbers[1:], results[1:], strict=False)
    return Problem(
        id=problem_id("arithmetic", question),
        question=question,
        prompt=f"{question}\n",
        answer=str(results[-1]),
        solution="\n".join(f"{left}{sign}{right}={result}" for left, sign, right, result in steps),
    )


def _expression(numbers: list[int], signs: list[str]) -> str:
    """Written such that the usual precedence works it from left to right."""
    text, loose = str(numbers[0]), False
    for sign, number in zip(signs, numbers[1:], strict=True):
        text = f"({text})*{number}" if sign == "*" and loose else f"{text}{sign}{number}"
        loose = sign != "*"
    return text

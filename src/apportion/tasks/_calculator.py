"""Arithmetic with numbers too long for the head, and a calculator to call."""

from dataclasses import replace
from fractions import Fraction

from apportion.signals import last_number, lines
from apportion.tasks._arithmetic import arithmetic
from apportion.tasks._core import BasicTask, Problem, problem_id
from apportion.tasks._environment import ToolUse, calculate

INSTRUCTION = (
    "Work it out from left to right, one operation at a time. To use a calculator write, for example, "
    "<tool>12*7</tool> and stop; its answer comes as <result>84</result>. End with the number alone."
)


def calculator(
    *,
    terms: int = 3,
    digits: int = 3,
    operators: str = "+-*",
    chat: bool = False,
    train: int = 4096,
    test: int = 512,
    seed: int = 0,
) -> BasicTask:
    """Arithmetic with long numbers and a calculator: <tool>12*7</tool> is answered <result>84</result>.

    The questions are those of `arithmetic`. Each call is a turn, which the calculator answers; a turn without a call is
    the last. A rollout is right if the last number after its last call is the answer. A worked solution calls the
    calculator for every operation.

    Args:
        terms, digits, operators: as in `arithmetic`.
        chat: prompts are chat messages that explain the calculator; False = the question and a line break, for a model
            that learns the calls from worked solutions (`warmup`).
        train, test: how many problems. seed: which.

    Raises:
        ValueError: a setting is out of range, or there are too few different questions.

    Example:
        >>> task = calculator(train=1, test=1)
        >>> task.environment(task.train[0]).reply("<tool>347*58</tool>").text
        '<result>20126</result>\\n'
    """
    base = arithmetic(terms=terms, digits=digits, operators=operators, negative=True, train=train, test=test, seed=seed)
    learn, held = ([_problem(p, chat) for p in pool] for pool in (base.train, base.test))
    return BasicTask("calculator", learn, held, _verify, lines(), environment=lambda _: ToolUse({"tool": calculate}))


def _verify(problem: Problem, text: str) -> float:
    return float(last_number(text.rpartition("</tool>")[2]) == Fraction(problem.answer))


def _problem(base: Problem, chat: bool) -> Problem:
    """The question of `arithmetic`, worked by calls: its equations without their right sides."""
    assert base.solution is not None
    calls = [f"<tool>{line.partition('=')[0]}</tool>" for line in base.solution.split("\n")]
    text = f"{base.question}\n"
    return replace(
        base,
        id=problem_id("calculator", base.question),
        prompt=[{"role": "user", "content": text + INSTRUCTION}] if chat else text,
        solution="".join([*calls, base.answer]),
    )

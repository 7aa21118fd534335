"""Tools called in text: what is read as a call, what comes back, and what a hostile text cannot do."""

import math
import time
from fractions import Fraction

import pytest

from apportion.signals import arithmetic_value
from apportion.tasks import Environment, Reply, ToolUse, calculate, calculator, resolve_task


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("12*7", "84"),
        (" 2 * (3+4)\n", "14"),
        ("10-2-3", "5"),
        ("-5-3", "-8"),
        ("2^10", "1024"),
        ("1,200/5", "240"),
        ("1/8", "0.125"),
        ("2/3", "0.6666666667"),
        ("50%*3", "1.5"),
        ("7", "7"),
    ],
)
def test_the_calculator(text, want):
    assert calculate(text) == want


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1/0", "division by zero"),
        ("__import__('os').getcwd()", "not an arithmetic expression"),
        ("x+1", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("2+", "an operand is missing"),
        ("1=1", "something after the end"),
        ("9^9^9^9", "too large"),
        ("9^99*9^99*9^99", "too large"),
        ("(" * 500 + "1" + ")" * 500, "not an arithmetic expression"),
        ("(" * 90 + "1" + ")" * 90, "too many parentheses"),
        ("9" * 100, "too long"),
        ("1+" * 100_000 + "1", "not an arithmetic expression"),
    ],
)
def test_what_the_calculator_refuses(text, why):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=why):
        calculate(text)
    assert time.perf_counter() - start < 1


def test_a_value_is_exact():
    assert arithmetic_value("0.1+0.2") == Fraction(3, 10)


def test_the_last_call_of_a_turn_is_answered_and_a_turn_without_one_is_the_end():
    tools = ToolUse({"tool": calculate, "upper": str.upper})
    assert tools.stop == ("</tool>", "</upper>")
    assert tools.reply("Let me see. <tool>12*7</tool>").text == "<result>84</result>\n"
    assert tools.reply("<tool>1+1<tool>2+2</tool>\n").text == "<result>4</result>\n"
    assert tools.reply("<upper>abc</upper>").text == "<result>ABC</result>\n"
    assert tools.reply("<tool>a*7</tool>").text == "<result>error: not an arithmetic expression</result>\n"
    assert tools.reply("12*7</tool>").text == "<result>error: no call</result>\n"
    assert tools.reply("<tool>12*7</tool> is 84").text is None
    assert tools.reply("<result>84</result>").text is None
    assert tools.reply("").text is None
    assert math.isnan(tools.reply("84").reward)


def test_only_a_value_error_of_a_tool_is_told_to_the_policy():
    def broken(_):
        raise KeyError("table")

    with pytest.raises(KeyError):
        ToolUse({"tool": broken}).reply("<tool>x</tool>")


def test_an_environment_needs_only_reply():
    class Silent(Environment):
        def reply(self, text):
            return Reply()

    made = Silent()
    assert (made.stop, made.state, made.close()) == ((), None, None)
    with pytest.raises(TypeError, match="the text of a Reply must be text or None; got int"):
        Reply(84)
    with pytest.raises(ValueError, match="must be a number or NaN; got infinity"):
        Reply("x", reward=math.inf)


def test_the_calculator_task():
    task = resolve_task("calculator(terms=3, digits=2, train=40, test=8)")
    assert repr(task).startswith("<task calculator: 40 train, 8 test")
    for problem in task.train:
        value, calls = problem.answer, problem.solution.split("</tool>")
        assert [calculate(c.removeprefix("<tool>")) for c in calls[:-1]][-1] == value == calls[-1]
        assert len(calls) == 3
        assert task.verify(problem, problem.solution) == 1
    problem = task.train[0]
    assert task.verify(problem, f"<tool>0+{problem.answer}</tool>\n") == 0  # a call is no answer
    assert task.verify(problem, problem.answer) == 1
    (message,) = calculator(train=1, test=1, chat=True).train[0].prompt
    assert "<tool>12*7</tool>" in message["content"]

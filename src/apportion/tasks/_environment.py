"""What answers the turns of a rollout: a tool, a game, a partner in a dialogue."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

from apportion.signals import arithmetic_value

MAX_BITS = 200
"""Longest result of `calculate`, about 60 digits."""


@dataclass(frozen=True)
class Reply:
    """The answer to a turn.

    Args:
        text: what the policy reads next; None = the episode is over.
        reward: what the turn earned; NaN = nobody says.
        role: who speaks, where prompts are chat messages; "tool" where the model's chat template knows it.

    Raises:
        ValueError: an infinite reward. TypeError: something else than text.
    """

    text: str | None = None
    reward: float = math.nan
    role: str = "user"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str | None):
            raise TypeError(f"the text of a Reply must be text or None; got {type(self.text).__name__}.")
        if math.isinf(self.reward):
            raise ValueError("the reward of a Reply must be a number or NaN; got infinity.")


class Environment(Protocol):
    """Answers the turns of one rollout. Inherit from it: only `reply` must be written.

    A task with `environment(problem) -> Environment` is sampled in turns; every rollout gets an environment of its own.
    Rollouts wait for their answers at the same time, each in a thread, so what they share must bear that. For equal
    seeds to give equal runs, answers must depend on nothing but the problem and the turns so far.

    The task's verifier has the last word about a rollout. Where it says nothing (NaN, as `unverified` does everywhere),
    the outcome is what the turns earned in all; so a game that pays for its turns is
    `BasicTask(name, train, test, unverified, environment=Game)`. A rollout that earned nothing known is not measured:
    give `cut_reward`, or `truncated_reward`, for those that are cut in their first turn.

    What the policy wrote is hostile text. And a reply is read as it stands: a special token written in it counts as one,
    so do not pass on a stranger's text unseen.

    Attributes:
        stop: texts that end a turn, such as the closing tag of a call, beside those of the run.
        state: the situation in which the next turn begins, text or anything hashable; the same wherever it recurs in
            rollouts of one problem, so without counters or history. `gigpo` compares turns by it. None = unknown.
        cut_reward: what a turn earns that a limit cut, and that is therefore not answered.

    Example:
        >>> class Guess(Environment):
        ...     def __init__(self, problem):
        ...         self.secret, self.state = int(problem.answer), "start"
        ...     def reply(self, text):
        ...         guess = int(text) if text.strip().isdecimal() else 0
        ...         self.state = guess
        ...         if guess == self.secret:
        ...             return Reply(reward=1.0)
        ...         return Reply("higher" if guess < self.secret else "lower", reward=0.0)
    """

    stop: tuple[str, ...] = ()
    state: Hashable = None
    cut_reward: float = math.nan

    def reply(self, text: str) -> Reply:
        """The answer to the turn that the policy has just written."""

    def close(self) -> None:
        """Called once, when the rollout is over."""
        return


class ToolUse(Environment):
    """Tools that are called in text: `<NAME>input</NAME>` ends the turn and is answered `<result>output</result>`.

    A turn that ends otherwise is the final answer. A tool raises ValueError for an input that it cannot use; its words
    are the result. Any other exception stops the run.

    Args:
        tools: from the name in the tag to a function from text to text.

    Example:
        >>> ToolUse({"tool": calculate}).reply("First the product: <tool>12*7</tool>").text
        '<result>84</result>\\n'
        >>> ToolUse({"tool": calculate}).reply("The answer is 84.").text is None
        True
    """

    def __init__(self, tools: Mapping[str, Callable[[str], str]]):
        self.tools = dict(tools)
        self.stop = tuple(f"</{name}>" for name in tools)

    def reply(self, text: str) -> Reply:
        """The tool's output, or the end."""
        for name, tool in self.tools.items():
            before, closing, after = text.rpartition(f"</{name}>")
            if closing and not after.strip():
                _, opening, given = before.rpartition(f"<{name}>")
                return Reply(f"<result>{self._output(tool, given) if opening else 'error: no call'}</result>\n")
        return Reply()

    def _output(self, tool: Callable[[str], str], given: str) -> str:
        try:
            return tool(given)
        except ValueError as error:
            return f"error: {error}"


def calculate(text: str) -> str:
    """The value of an arithmetic expression of numbers, `+ - * / ^` and parentheses: read, never evaluated as code.

    Raises:
        ValueError: the text is no such expression, it divides by zero, or a number is too large.

    Example:
        >>> calculate("2*(3+4)"), calculate("1/4"), calculate("2/3")
        ('14', '0.25', '0.6666666667')
    """
    try:
        value = arithmetic_value(text)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("too large")
    return str(value) if value.denominator == 1 else f"{float(value):.10g}"

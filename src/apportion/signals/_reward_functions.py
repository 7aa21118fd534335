"""Rewards and penalties of a whole response that need no gold answer: its form, its length, its repetitions."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from apportion.signals._process import Worker
from apportion.types import Rollouts


@dataclass(frozen=True)
class Matches:
    """What `matches` returns."""

    pattern: str
    seconds: float = 5.0

    name = "matches"

    def __repr__(self) -> str:
        limit = "" if self.seconds == 5.0 else f", seconds={self.seconds:g}"
        return f"matches({self.pattern!r}{limit})"

    @cached_property
    def worker(self) -> Worker:
        """The process that searches, which starts with the first call."""
        return Worker(f"{Path(__file__).with_name('_matching.py')}:found", seconds=self.seconds)

    def __call__(self, problem: Any, text: str) -> float:
        """1 if the pattern occurs in the text, else 0.

        Raises:
            TimeoutError: the search took too long. RuntimeError: it ended in another way.
        """
        reply = self.worker(self.pattern, text)
        if reply.status == "time":
            raise TimeoutError(f"searching {self.pattern!r} took over {self.seconds:g} s; make the pattern simpler")
        if reply.status != "ok":
            raise RuntimeError(f"searching {self.pattern!r} ended with {reply.value or reply.status}")
        return float(reply.value)


def matches(pattern: str, seconds: float = 5.0) -> Matches:
    r"""1 if a regular expression occurs in the response, else 0: a reward of its form.

    `re.search`: anchor it with `\A` and `\Z` to describe the whole response, and begin with `(?s)` if `.` shall match line
    breaks. It runs in a process that is killed after `seconds`, because a pattern such as `(a+)+b` may take years.

    Reads: the text. Scope: row. Unit: trajectory.
    Degenerate: an empty response matches what matches nothing.

    Raises:
        ValueError: the expression cannot be compiled.

    Example:
        >>> think = matches(r"(?s)\A<think>.*</think>\s*<answer>.*</answer>\s*\Z")
        >>> think(None, "<think>7+5=12</think>\n<answer>12</answer>"), think(None, "12")
        (1.0, 0.0)
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"matches needs a regular expression; {pattern!r} is none: {error}.") from error
    return Matches(pattern, seconds)


@dataclass(frozen=True)
class TokenReward:
    """A reward that reads nothing but the tokens that the policy chose.

    Args:
        expression: the call that makes it, which is also its `repr`.
        name: its usual name.
        of: from the tokens of a trajectory to its reward.
        of_cut: whether it is meant for responses that the limit cut, too.
    """

    expression: str
    name: str
    of: Callable[[Sequence[int]], float] = field(repr=False, compare=False)
    of_cut: bool = False

    def __repr__(self) -> str:
        return self.expression

    def score_rollouts(self, problems: Sequence[Any], rollouts: Rollouts) -> list[float]:
        """One reward per trajectory."""
        return [self.of(tokens) for tokens in acted_tokens(rollouts)]


def acted_tokens(rollouts: Rollouts) -> list[list[int]]:
    """The tokens that the policy chose, the end token included, of each trajectory, [N] lists.

    Example:
        >>> r = Rollouts.from_lists([[1, 2, 3]], [0], action_mask=[[False, True, True]])
        >>> acted_tokens(r)
        [[2, 3]]
    """
    if rollouts.tokens is None:
        raise ValueError("a reward of the tokens needs rollouts.tokens, which this batch lacks. Give token ids.")
    rows = zip(rollouts.tokens.tolist(), rollouts.action_mask.tolist(), strict=True)
    acted = [[token for token, act in zip(*row, strict=True) if act] for row in rows]
    out: list[list[int]] = [[] for _ in range(rollouts.num_trajectories)]
    trajectory, place = rollouts.trajectory_ids.tolist(), rollouts.row_index.tolist()
    for row in sorted(range(rollouts.batch), key=place.__getitem__):
        out[trajectory[row]] += acted[row]
    return out


def overlong(limit: int, buffer: int) -> TokenReward:
    """A penalty that begins `buffer` tokens before the limit and reaches -1 at it: a soft overlong punishment.

    `0 if n <= limit - buffer; ((limit - buffer) - n) / buffer if n <= limit; else -1`, n = tokens the policy chose.

    Source: DAPO, arXiv 2503.14476, equation 13.
    Reads: tokens, action_mask. Scope: row. Unit: trajectory.
    Degenerate: buffer 0, -1 beyond the limit and 0 up to it.
    With the trainer: `limit` is usually `max_new_tokens`, and `truncated_reward` must be None, which would otherwise
        replace the penalty of the longest responses.

    Raises:
        ValueError: a limit below 1, or a buffer that is negative or larger than the limit.

    Example:
        >>> penalty = overlong(limit=100, buffer=20)
        >>> [penalty.of([0] * n) for n in (80, 85, 100, 101)]
        [0.0, -0.25, -1.0, -1.0]
    """
    if limit < 1 or not 0 <= buffer <= limit:
        raise ValueError(f"overlong needs limit >= 1 and 0 <= buffer <= limit; got limit={limit}, buffer={buffer}.")

    def of(tokens: Sequence[int]) -> float:
        over = len(tokens) - (limit - buffer)
        return 0.0 if over <= 0 else -min(1.0, over / buffer if buffer else 1.0)

    return TokenReward(f"overlong(limit={limit}, buffer={buffer})", "overlong", of, of_cut=True)


def repetition(n: int = 3) -> TokenReward:
    """A penalty for saying the same again: minus the share of n-grams of tokens that occurred before.

    `-(1 - different n-grams / n-grams)`, from 0 to almost -1; times its weight.

    Source: arXiv 2502.03373, appendix C.2, in the form of TRL 1.16's `get_repetition_penalty_reward`.
    Reads: tokens, action_mask. Scope: row. Unit: trajectory.
    Degenerate: a response shorter than n tokens, 0.

    Raises:
        ValueError: n below 1.

    Example:
        >>> repetition(2).of([1, 2, 3, 4]), repetition(2).of([5, 5, 5, 5, 5])
        (0.0, -0.75)
    """
    if n < 1:
        raise ValueError(f"repetition needs n of at least 1; got {n}.")

    def of(tokens: Sequence[int]) -> float:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return TokenReward(f"repetition(n={n})", "repetition", of)


@dataclass(frozen=True)
class SignalReward:
    """What `of_signal` returns."""

    signal: str

    @property
    def name(self) -> str:
        """`of_` and the signal's name."""
        return f"of_{self.signal}"

    def __repr__(self) -> str:
        return f"of_signal({self.signal!r})"

    def score_rollouts(self, problems: Sequence[Any], rollouts: Rollouts) -> list[float]:
        """The signal's value of each trajectory."""
        found = rollouts.signals.get(self.signal)
        if found is None or found.unit != "trajectory":
            known = ", ".join(name for name, x in rollouts.signals.items() if x.unit == "trajectory") or "none"
            raise ValueError(
                f"{self!r} needs a signal of unit trajectory that is there before the rewards; there is: {known}."
            )
        return [float(x) for x in found.values.tolist()]


def of_signal(signal: str) -> SignalReward:
    """A reward that was measured while the responses were sampled, such as the rewards of an environment, added up.

    Reads: signals[signal] of unit trajectory ("environment", where the task answers back). Scope: row. Unit: trajectory.

    Example:
        >>> r = Rollouts.from_lists([[1], [2]], [0, 0], outcome=[0.5, 1.0])
        >>> of_signal("outcome").score_rollouts([], r)
        [0.5, 1.0]
    """
    return SignalReward(signal)

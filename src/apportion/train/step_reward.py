"""Rewards of the steps or turns of a response, by a function of the user's."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from apportion.signals import step_texts, steps_by_trajectory
from apportion.tasks import Problem
from apportion.train.asking import Failure, ask, named, shown
from apportion.train.rewards import failed
from apportion.types import Rollouts, Signal

_USUAL = {"step": "process", "turn": "turn_reward"}


@dataclass(frozen=True)
class StepReward:
    """Measures one reward for each step (or turn, or any other span) of a response.

    `f(problem, texts) -> rewards`: the texts of the steps of one response, in order, and one number for each of them; NaN
    or None where a step was not measured. Methods read them as signals["process"] over "step" (`pure`) or
    signals["turn_reward"] over "turn" (`gigpo`).

    Reads: the spans, meta "pieces", "prompt_id", "question", "answer". Scope: row. Unit: the spans.
    Degenerate: a response without steps is not asked about.

    Args:
        function: as in `Reward`: plain (called in a thread), async (all responses together), or text, `module:function` (in
            a process that is killed when it hangs). The problem has id, question and answer.
        over: the spans.
        name: of the signal; empty = "process" over steps, "turn_reward" over turns.
        seconds: limit for one response.
        unmeasured: what a response is on which the function raises, hangs or gives another number of rewards: an error
            that names it ("stop"), or unmeasured in all its steps ("skip").

    Raises:
        ValueError: no name for spans that are neither steps nor turns.
        RewardFailed: by `measure`, see `unmeasured`; an infinite reward.
    """

    function: Any
    over: str = "step"
    name: str = ""
    seconds: float = 60.0
    unmeasured: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not self.name and self.over not in _USUAL:
            raise ValueError(f"a StepReward over {self.over!r} needs a name for its signal. Give name='...'.")
        given = named(self.function) if isinstance(self.function, str) else self.function
        object.__setattr__(self, "function", given)
        object.__setattr__(self, "name", self.name or _USUAL[self.over])

    def __repr__(self) -> str:
        return f"StepReward({shown(self.function)}, over={self.over!r}, name={self.name!r})"

    @property
    def provides(self) -> tuple[str, ...]:
        """The signal."""
        return (f"signals.{self.name}",)

    @property
    def requires(self) -> tuple[str, ...]:
        """The spans."""
        return (f"spans.{self.over}",)

    def check(self) -> None:
        """Start what the function needs, so that what is wrong is found now."""
        getattr(self.function, "check", lambda: None)()

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{name: [S]}`."""
        texts, owned = step_texts(rollouts, self.over), steps_by_trajectory(rollouts, self.over)
        first = {n: row for row, n in reversed(list(enumerate(rollouts.trajectory_ids.tolist())))}
        asked = [n for n, steps in enumerate(owned) if steps]
        questions = [(_problem(rollouts, first[n]), [texts[s] for s in owned[n]]) for n in asked]
        values = torch.full((len(texts),), torch.nan)
        for n, question, answer in zip(asked, questions, ask(self.function, questions, self.seconds), strict=True):
            rewards = _rewards(answer, len(owned[n]))
            if isinstance(rewards, Failure):
                if self.unmeasured == "stop":
                    what, (problem, steps) = f"the reward {self.name} {rewards.reason}", question
                    raise failed(what, [first[n]], problem.id, "\n".join(steps)) from rewards.cause
                continue
            values[owned[n]] = torch.tensor(rewards)
        return {self.name: Signal(values.to(rollouts.device), self.over)}


def _problem(rollouts: Rollouts, row: int) -> Problem:
    """What the rollouts tell of the problem of a row."""
    known = {
        key: rollouts.meta[key][row] if key in rollouts.meta else "" for key in ("prompt_id", "question", "answer")
    }
    return Problem(known["prompt_id"], known["question"], known["question"], known["answer"])


def _rewards(answer: Any, count: int) -> list[float] | Failure:
    """One number for each step."""
    if isinstance(answer, Failure):
        return answer
    try:
        found = [math.nan if x is None else float(x) for x in answer]
    except (TypeError, ValueError):
        return Failure(f"gave {answer!r:.80} instead of one number per step")
    if len(found) != count:
        return Failure(f"gave {len(found)} numbers for {count} steps")
    infinite = next((x for x in found if math.isinf(x)), None)
    return found if infinite is None else Failure(f"is {infinite} on a step")

"""What a world gives: rollouts, and the truth about every token of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.types import Rollouts, Signal

_NOISE = 987_654_321  # the noise of a seed is not what a world draws first from the same seed


@dataclass(frozen=True)
class Cost:
    """What measuring one thing costs, per rollout.

    Args:
        tokens: further tokens that the policy samples.
        judge_calls: replies of a judge, each about as long as the rollout it speaks about.
        passes: further passes of a model over the rollout (critic, reference, process reward model).
    """

    tokens: float = 0.0
    judge_calls: float = 0.0
    passes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens + other.tokens, self.judge_calls + other.judge_calls, self.passes + other.passes)


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """A batch that a world sampled, and what is true of it.

    Let s be what the policy had seen before a position and a what it chose there. A(s, a) = Q(s, a) - V(s), with the
    expected outcome of the policy that sampled as V.

    Args:
        rollouts: with every signal that the world can measure.
        advantages: A of each action position; 0 elsewhere, [B, T].
        errors: standard error of `advantages`, [B, T]; None = exact.
        decisive: action positions at which the choice can change the outcome, [B, T].
        mistake: action positions of the first wrong step; a rollout without one has none, [B, T].
        pairs: an id of (s, a) at each action position, equal where prompt, s and a are; -1 elsewhere, [B, T].
        prompts: which prompt each group answers, [G].
        gradients: from weights [B, T] to the policy gradient of each group, `mean over its trajectories of
            sum_t weights_t * d log pi(a_t | s_t) / d parameters`, [G, P]. P may be a part of the parameters.
        gradient: what that is on average for each group's prompt with A as weights: the gradient of the expected
            outcome, [G, P].
        costs: of signals and fields, by the names that `requires` uses; what is not listed costs nothing.
        seed: of the noise that `random_credit` reads.
    """

    rollouts: Rollouts
    advantages: Float[Tensor, "B T"]
    errors: Float[Tensor, "B T"] | None = None
    decisive: Bool[Tensor, "B T"]
    mistake: Bool[Tensor, "B T"]
    pairs: Int[Tensor, "B T"]
    prompts: Int[Tensor, " G"]
    gradients: Callable[[Float[Tensor, "B T"]], Float[Tensor, "G P"]]
    gradient: Float[Tensor, "G P"]
    costs: Mapping[str, Cost] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """The truth travels as signals too, for the two bars of `_bars.py`."""
        generator = torch.Generator().manual_seed(self.seed + _NOISE)
        noise = torch.randn(self.advantages.shape, generator=generator, dtype=torch.float64)
        truth = {"exact": Signal(self.advantages.double(), "token"), "noise": Signal(noise, "token")}
        object.__setattr__(self, "rollouts", self.rollouts.with_signals(**truth))


@runtime_checkable
class World(Protocol):
    """A small policy in a small world whose advantages are known.

    A world is a frozen dataclass: its fields are its knobs, `repr(world)` the expression that makes it, and
    `dataclasses.replace(world, verdict_error=0.4)` the same world with one knob turned.
    """

    def episodes(self, groups: int, size: int, seed: int) -> Episodes:
        """Sample `groups` groups of `size` rollouts; the world's prompts take turns. Same seed, same episodes.

        What the world is made of (prompts, rewards, the policy) depends on the knobs alone, never on `seed`.
        """

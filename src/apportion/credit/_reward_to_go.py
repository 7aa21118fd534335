"""Credit without a critic: the discounted reward that is still to come, and REINFORCE++ made of it."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import (
    Estimator,
    Settings,
    alias,
    assemble,
    dialect,
    estimator,
    measured_mask,
    trajectory_values,
)
from apportion.credit._combine import chain
from apportion.credit._group import group_relative
from apportion.credit._line import Line, action_line
from apportion.credit._returns import penalty_at_actions, penalty_requires, rewards_at_actions
from apportion.credit._transforms import whiten
from apportion.functional import suffix_sum
from apportion.types import Credit, Rollouts, Signal

Observations = Literal["skip", "reset", "count"]


def _requires(s: Settings) -> tuple[str, ...]:
    return ("signals.{reward}", *penalty_requires(s))


def _laws(s: Settings) -> tuple[str, ...]:
    additive = ("additive",) if s["gamma"] == 1 and s["observations"] != "reset" else ()
    return additive if s["kl_coef"] else (*additive, "linear")


@estimator(requires=_requires, laws=_laws)
def returns_to_go(
    rollouts: Rollouts,
    *,
    gamma: float = 1.0,
    observations: Observations = "skip",
    kl_coef: float | str = 0.0,
    reward: str = "outcome",
) -> Credit:
    """What was earned from each action on: REINFORCE, with nothing taken off.

    `A_t = r_t + gamma A_(t+1)`, where t + 1 is the next action of the trajectory, or what `observations` says.

    Source: REINFORCE, as REINFORCE++ uses it, arXiv 2501.03262: the outcome on the last action,
        `-kl_coef (ln pi_old - ln pi_ref)` on every one. Trainers differ in what tool output does to the sum: `observations`.
    Reads: signals[reward]; logprobs (old_logprobs first) and ref_logprobs for `kl_coef`. Scope: row. Unit: token; the
        trajectory for an outcome that nothing discounts.
    Cost: none beyond the rollouts; a reference model's pass if `kl_coef`.
    Laws: for gamma = 1, without "reset", the outcome on every action; rewards times c give advantages times c. The returns
        for a critic are the advantages.
    Degenerate: an empty response nothing; an unmeasured outcome advantage 0 and mask False; an unmeasured reward of a span
        or token 0.

    Args:
        rollouts: the batch.
        gamma: discount per step.
        observations: positions between two actions of a row take no time ("skip"), take a step each ("count"), or end the
            sum, so that only an unbroken run of actions is paid for what it earned ("reset"). From the last action of a
            row to the first of the trajectory's next row it is one step ("skip", "count") or the end ("reset"): what
            that row shows before its first action is not counted, as it repeats what was seen before.
        kl_coef: weight of the penalty against the reference model inside the reward; or the name of a batch signal that
            holds it (NaN = no penalty), where a trainer steers it from step to step.
        reward: a signal per trajectory (on its last action), per span (on the span's last action) or per token.

    Raises:
        ValueError: a reward with several values each, or per group or batch.

    Example:
        >>> r = Rollouts.from_lists([[1, 2, 3]], [0], outcome=[1.0], action_mask=[[True, False, True]])
        >>> [returns_to_go(r, gamma=0.5, observations=how).advantages.tolist() for how in ("skip", "reset", "count")]
        [[[0.5, 0.0, 1.0]], [[0.0, 0.0, 1.0]], [[0.25, 0.0, 1.0]]]
    """
    parts = {}
    whole = gamma == 1 and observations != "reset" and rollouts.signals[reward].unit == "trajectory"
    if whole:
        values = trajectory_values(rollouts, reward, "returns_to_go")
        measured = ~values.isnan()
        parts[reward] = Signal(torch.where(measured, values, 0.0), "trajectory")
    if not whole or kl_coef:
        line = action_line(rollouts, observations=observations == "count")
        carry = gamma * _goes_on(line, observations).double()
    if not whole:
        measured, earned = rewards_at_actions(rollouts, line, reward, "returns_to_go")
        parts[reward] = Signal(line.put(line.of_actions(suffix_sum(earned, carry))), "token")
    if kl_coef:
        penalty = suffix_sum(penalty_at_actions(rollouts, line, kl_coef, "returns_to_go"), carry)
        parts["kl"] = Signal(line.put(line.of_actions(penalty)), "token")
    credit = assemble(rollouts, measured_mask(rollouts, measured), parts)
    return replace(credit, returns=credit.advantages)


def _goes_on(line: Line, observations: Observations) -> Tensor:
    """Whether what comes after a position of the line is added to it."""
    if observations != "reset":
        return line.goes_on
    following = line.positions + 1
    beside = (line.positions.roll(-1) == following) & (following % max(line.shape[1], 1) != 0)
    return line.goes_on & beside


@alias
def reinforce_plus_plus(
    *,
    gamma: float = 1.0,
    observations: Observations = "skip",
    kl_coef: float | str = 0.0,
    reward: str = "outcome",
) -> Estimator:
    """REINFORCE++: discounted returns with the penalty inside, normalised over all tokens of the batch.

    Source: arXiv 2501.03262. Trainers differ: `.verl()`, `.skyrl()`, `.openrlhf()`. The paper's penalty is always there; its
        weight of 0 is ours, so that no reference model is needed.
    Cost: none beyond the rollouts; a reference model's pass if `kl_coef`.

    Example:
        >>> reinforce_plus_plus()
        chain(returns_to_go(gamma=1.0, observations='skip', kl_coef=0.0, reward='outcome'), whiten())
    """
    return chain(returns_to_go(gamma=gamma, observations=observations, kl_coef=kl_coef, reward=reward), whiten())


@dialect(reinforce_plus_plus)
def verl(*, gamma: float = 1.0, kl_coef: float | str = 0.0, reward: str = "outcome") -> Estimator:
    """verl 0.9.1: the return is carried past observations; sample variance, eps 1e-8 inside."""
    return chain(returns_to_go(gamma=gamma, kl_coef=kl_coef, reward=reward), whiten())


@dialect(reinforce_plus_plus)
def skyrl(*, gamma: float = 1.0, kl_coef: float | str = 0.0, reward: str = "outcome") -> Estimator:
    """SkyRL 0.3.0: the return begins anew before an observation; whitened as in verl."""
    return chain(returns_to_go(gamma=gamma, observations="reset", kl_coef=kl_coef, reward=reward), whiten())


@dialect(reinforce_plus_plus)
def openrlhf(*, gamma: float = 1.0, kl_coef: float | str = 0.01, reward: str = "outcome") -> Estimator:
    """OpenRLHF 0.11.2 `reinforce`: an observation is a step; the population's variance, at least 1e-8."""
    return chain(
        returns_to_go(gamma=gamma, observations="count", kl_coef=kl_coef, reward=reward),
        whiten(ddof=0, eps_inside="floor"),
    )


@alias
def reinforce_plus_plus_baseline(
    *, singleton: Literal["zero", "raw", "error"] = "zero", reward: str = "outcome"
) -> Estimator:
    """REINFORCE++-baseline: reward above the group's mean, on every token, normalised over all tokens of the batch.

    Source: arXiv 2501.03262; verl 0.9.1 for `singleton="raw"`. A long response weighs more in the normalisation.
    Cost: none beyond the rollouts.

    Example:
        >>> reinforce_plus_plus_baseline()
        chain(group_relative(reward='outcome', baseline='mean', scale=None, singleton='zero'), whiten())
    """
    return chain(group_relative(reward=reward, baseline="mean", scale=None, singleton=singleton), whiten())


@dialect(reinforce_plus_plus_baseline, name="openrlhf")
def openrlhf_baseline(*, reward: str = "outcome") -> Estimator:
    """OpenRLHF 0.11.2, `reinforce_baseline` without its KL: whitened by the population variance, at least 1e-8."""
    return chain(group_relative(reward=reward, baseline="mean", scale=None), whiten(ddof=0, eps_inside="floor"))

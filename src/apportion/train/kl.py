"""The penalty for leaving the reference, outside the loss: measured, taken off the outcome, and steered to a target."""

import math

import torch
from torch import Tensor

from apportion.types import Rollouts, Signal


def reference_kl(rollouts: Rollouts) -> float:
    """Mean over the actions of `ln pi - ln ref`, in nats per token; pi is `old_logprobs`, else what the sampler recorded.

    On the policy's own samples it is unbiased for KL(pi | ref), and may be negative in a small batch.

    Reads: logprobs (old_logprobs first), ref_logprobs. Scope: batch.
    Degenerate: no action gives NaN.

    Raises:
        ValueError: one of the two was not measured.

    Example:
        >>> reference_kl(Rollouts.from_lists([[1, 2]], [0], logprobs=[[-1.0, -2.0]], ref_logprobs=[[-2.0, -2.5]]))
        0.75
    """
    return float(_gap(rollouts).sum() / rollouts.action_mask.sum())


def penalised(rollouts: Rollouts, coef: float) -> Rollouts:
    """The penalty inside the reward: `outcome - coef * sum over the response's actions of (ln pi - ln ref)`.

    Every credit method then sees it, also those that compare outcomes within a group. What the verifiers gave is kept as
    the signal "score".

    Source: arXiv 1909.08593 equation 2; TRL's RLOO. `gae` and `returns_to_go` have `kl_coef` of their own, which puts the
        penalty on the token that caused it: use one of the two.
    Reads: signals["outcome"] over trajectories, logprobs (old_logprobs first), ref_logprobs. Scope: row; the actions of
        all rows of a trajectory are added.
    Laws: where pi equals ref nothing changes. Degenerate: an empty response keeps its outcome, an unmeasured one stays
        unmeasured.

    Raises:
        ValueError: a log-probability was not measured, or the outcome is not one number per trajectory.

    Example:
        >>> r = Rollouts.from_lists([[1, 2]], [0], outcome=[1.0], logprobs=[[-1.0, -2.0]], ref_logprobs=[[-2.0, -2.5]])
        >>> penalised(r, 0.5).signals["outcome"].values
        tensor([0.2500])
    """
    outcome = rollouts.signals["outcome"]
    if outcome.unit != "trajectory" or outcome.values.dim() != 1:
        raise ValueError(
            f'the penalty in the reward needs signals["outcome"] with one number per trajectory; got unit {outcome.unit!r} '
            f"and shape {list(outcome.values.shape)}. Put the penalty into the loss (kl_in='loss')."
        )
    gap = _gap(rollouts).sum(1)
    total = gap.new_zeros(rollouts.num_trajectories).index_add_(0, rollouts.trajectory_ids, gap)
    values = (outcome.values.double() - coef * total).to(outcome.values.dtype)
    return rollouts.with_signals(score=outcome, outcome=Signal(values, "trajectory"))


def steered(coef: float, kl: float, *, target: float, horizon: int, count: int) -> float:
    """The coefficient for the next step: a fifth up or down at most, for each `horizon` responses.

        e = clip(kl / target - 1, -0.2, 0.2),    next = coef (1 + e min(count / horizon, 1))

    Source: arXiv 1909.08593 section 2.2, with the gain of its released code, count / horizon. Departs: `kl` and `target`
        are per token, so that the target does not depend on the length of responses; the gain is at most 1, so that a
        step of more responses than `horizon` cannot turn the penalty into a reward.
    Laws: coef keeps its sign; kl equal to target changes nothing. Degenerate: 0 stays 0; NaN (nothing sampled) changes
        nothing.

    Args:
        coef: the present one. kl: nats per token, see `reference_kl`. target: what kl is steered to, above 0.
        horizon: responses over which coef follows. count: responses of this step.

    Raises:
        ValueError: target or horizon is not above 0.

    Example:
        >>> round(steered(0.05, 0.11, target=0.1, horizon=100, count=50), 6)  # e = 0.1, gain 0.5
        0.0525
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"steering needs kl_target and kl_horizon above 0; got {target} and {horizon}.")
    if math.isnan(kl):
        return coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(count / horizon, 1.0))


def _gap(rollouts: Rollouts) -> Tensor:
    """`ln pi - ln ref` at actions, 0 elsewhere, [B, T] in float64."""
    old = rollouts.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
    missing = [n for n, x in (("logprobs", old), ("ref_logprobs", rollouts.ref_logprobs)) if x is None]
    if missing:
        raise ValueError(
            f"the penalty against the reference needs rollouts.{missing[0]}, which this batch lacks. Record the "
            "log-probabilities of sampling and score the rows with a reference model."
        )
    assert old is not None
    assert rollouts.ref_logprobs is not None
    return torch.where(rollouts.action_mask, old.double() - rollouts.ref_logprobs.double(), 0.0)

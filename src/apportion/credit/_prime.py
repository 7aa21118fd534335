"""Credit from implicit process rewards: what a reward model trained on outcomes thinks of each token (PRIME)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import (
    Estimator,
    Settings,
    alias,
    assemble,
    estimator,
    measured_mask,
    token_values,
    trajectory_values,
)
from apportion.credit._combine import chain
from apportion.credit._line import Line, action_line
from apportion.credit._transforms import whiten
from apportion.functional import at_members, group_statistics, segment_count, segment_sum, suffix_sum
from apportion.types import Cover, Credit, Rollouts, Signal


def _scope(s: Settings) -> Cover:
    return "batch" if s["rescale"] else "group"


@estimator(
    requires=("signals.{reward}", "signals.{ratio}"), scope=_scope, needs_group_of=2, laws=("shift", "equal", "linear")
)
def process_implicit(
    rollouts: Rollouts,
    *,
    beta: float = 0.05,
    gamma: float = 1.0,
    outcome_gamma: float = 1.0,
    baseline: Literal["code", "paper"] = "code",
    rescale: Literal["batch_max"] | None = None,
    ratio: str = "log_ratio",
    reward: str = "outcome",
) -> Credit:
    """Outcome above that of the others, plus the implicit process rewards still to come above those of the others.

    `p_t = beta (ln pi_phi - ln pi_ref)` at each action, `m_i` its mean over response i, n responses in the group,
    `A_t = sum over s >= t of gamma^(s-t) q_s + outcome_gamma^(T-t) (o_i - mean of the others' o)`, where
    `q_s = p_s n / (n - 1) - sum of all m / (n - 1)` (`baseline="code"`) or `p_s - mean of the others' m` ("paper").

    Source: PRIME, arXiv 2502.01456, and its code (PRIME-RL/PRIME). The two baselines differ by (p_s - m_i) / (n - 1), which
        adds up to 0 over a response.
    Reads: signals[reward], signals[ratio] [B, T]. Scope: group; batch if `rescale`. Unit: token for the process
        rewards; trajectory for the outcome, token if it is discounted.
    Cost: a second trained model and a reference: their passes over the rollouts, and the update of the first.
    Laws: adding a constant to the outcomes of a group changes nothing; equal outcomes leave the process part alone; ratios
        of 0 and outcome_gamma = 1 give RLOO.
    Degenerate: a group with one measured trajectory 0; an unmeasured outcome advantage 0 and mask False, and no say in any
        mean; an unmeasured ratio adds nothing, counted in notes; an empty response has an outcome but no m.

    Args:
        rollouts: the batch.
        beta: nats to reward; not used if `rescale`.
        gamma: discount of process rewards, per action.
        outcome_gamma: discount of the outcome, which lies on the last action.
        baseline: how the process rewards of the others are taken off.
        rescale: the process rewards are the ratios over the largest size of their undiscounted sum from any action of the
            batch on, plus 1e-6 ("batch_max").
        ratio: signal with `ln pi_phi - ln pi_ref` of each token, phi the reward model.
        reward: signal with one reward per trajectory.

    Raises:
        ValueError: a ratio that is not per token; a reward that is not per trajectory.

    Example:
        >>> r = Rollouts.from_lists([[1, 2], [3]], [0, 0], outcome=[1.0, 0.0])
        >>> r = r.with_signals(log_ratio=Signal(torch.tensor([[20.0, 0.0], [-10.0, 0.0]]), "token"))
        >>> process_implicit(r, baseline="paper").advantages  # p = 1, 0 and -0.5; m = 0.5 and -0.5
        tensor([[ 3.0000,  1.5000],
                [-2.0000,  0.0000]])
    """
    outcome = trajectory_values(rollouts, reward, "process_implicit")
    stats = group_statistics(outcome, rollouts.trajectory_groups, rollouts.num_groups)
    n = at_members(stats.count, stats.ids)
    above = (stats.y - at_members(stats.mean, stats.ids)) * n / (n - 1).clamp(min=1)
    line = action_line(rollouts)
    goes_on = line.goes_on.double()
    ratios = line.take(token_values(rollouts, ratio, "process_implicit"))
    gain = torch.where(line.spread(stats.measured), ratios, torch.nan)
    gain = _rescaled(gain, goes_on) if rescale else beta * gain
    gain = _above_others(rollouts, line, gain, baseline)
    parts = {reward: Signal(above, "trajectory")}
    if outcome_gamma != 1:
        at_end = torch.where(line.goes_on, 0.0, line.spread(above))
        parts[reward] = Signal(line.put(suffix_sum(at_end, outcome_gamma * goes_on)), "token")
    parts[ratio] = Signal(line.put(suffix_sum(gain, gamma * goes_on)), "token")
    notes = {"singleton_groups": float((stats.count == 1).sum()), "unmeasured_tokens": float(ratios.isnan().sum())}
    return assemble(rollouts, measured_mask(rollouts, stats.measured), parts, notes=notes)


def _rescaled(gain: Tensor, goes_on: Tensor) -> Tensor:
    """The rewards over the largest size of their sum from any action on."""
    sums = suffix_sum(gain.nan_to_num(nan=0.0), goes_on)
    return gain / (sums.abs().max() + 1e-6) if len(gain) else gain


def _above_others(rollouts: Rollouts, line: Line, gain: Tensor, baseline: str) -> Tensor:
    """Each process reward above the mean of the others' means; 0 where it is NaN or where there are no others."""
    measured = ~gain.isnan()
    ids = torch.where(measured, line.trajectories, -1)
    count = segment_count(ids, rollouts.num_trajectories)
    mean = segment_sum(gain.nan_to_num(nan=0.0), ids, rollouts.num_trajectories) / count
    stats = group_statistics(mean, rollouts.trajectory_groups, rollouts.num_groups)
    n, total, low = (x[rollouts.trajectory_groups] for x in (stats.count, stats.total, stats.low))
    others = (n - 1).clamp(min=1)
    if baseline == "code":
        scale, taken = n / others, total / others
    else:
        scale, taken = torch.ones_like(n), (total - stats.y) / others
    mine = line.trajectories
    above = (gain - low[mine]) * scale[mine] - taken[mine]
    return torch.where(measured & (n[mine] > 1), above, 0.0)


@alias
def prime(
    *,
    beta: float = 0.05,
    gamma: float = 1.0,
    outcome_gamma: float = 1.0,
    baseline: Literal["code", "paper"] = "code",
    rescale: Literal["batch_max"] | None = "batch_max",
    ratio: str = "log_ratio",
    reward: str = "outcome",
) -> Estimator:
    """PRIME: outcome and implicit process rewards, each above the others of its group, added, then whitened.

    Source: arXiv 2502.01456, as its code computes it. Of its training, the update of the reward model is a loss.
    Cost: a second trained model and a reference: their passes over the rollouts, and the update of the first.

    Example:
        >>> prime(beta=0.1, rescale=None, baseline="paper").requires
        ('signals.outcome', 'signals.log_ratio')
    """
    process = process_implicit(
        beta=beta,
        gamma=gamma,
        outcome_gamma=outcome_gamma,
        baseline=baseline,
        rescale=rescale,
        ratio=ratio,
        reward=reward,
    )
    return chain(process, whiten())

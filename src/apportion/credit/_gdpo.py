"""Several rewards, each compared inside its group before they are added."""

from typing import Literal

import torch

from apportion.credit._base import (
    Estimator,
    Settings,
    Transform,
    alias,
    assemble,
    dialect,
    estimator,
    measured_mask,
    trajectory_values,
)
from apportion.credit._combine import chain
from apportion.credit._group import above_baseline, scale_of, unless_alone
from apportion.credit._transforms import whiten
from apportion.functional import group_statistics
from apportion.types import Credit, Rollouts, Signal

REWARDS = ("outcome", "format")


def _laws(s: Settings) -> tuple[str, ...]:
    compared = () if s["singleton"] == "raw" else ("shift", "equal")
    return compared if s["scale"] else (*compared, "linear")


@estimator(
    requires=lambda s: tuple(f"signals.{name}" for name in s["rewards"]),
    scope="group",
    needs_group_of=lambda s: 1 if s["singleton"] == "raw" else 2,
    laws=_laws,
)
def decoupled_relative(
    rollouts: Rollouts,
    *,
    rewards: tuple[str, ...] = REWARDS,
    weights: tuple[float, ...] | None = None,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["std", "leave_one_out_std"] | None = "std",
    ddof: int = 1,
    eps: float = 1e-4,
    flat: Literal["zero", "unscaled"] = "zero",
    singleton: Literal["zero", "raw"] = "zero",
    unmeasured: Literal["drop", "skip"] = "drop",
) -> Credit:
    """Each reward above what the group got, in units of its own deviation; then their weighted sum.

    `A_i = sum_k w_k (r_ki - mean_k) / (std_k + eps)`, over the rewards k. A group whose rewards of one kind are all equal
    gets nothing from that kind, and a reward on a wide scale does not drown the others.

    Source: GDPO, arXiv 2601.05242, the first of its two steps.
    Reads: signals[rewards] per trajectory. Scope: group. Unit: trajectory, one part for each reward.
    Cost: none beyond the rollouts.
    Laws: adding a constant to one reward of a group changes nothing; with `baseline="mean"` every part sums to 0 over it.
    Degenerate: a group with one measured member 0 (`singleton`); a reward equal for all: exactly 0 from it; unmeasured: see
        the setting.

    Args:
        rollouts: the batch.
        rewards: names of the signals, one number per trajectory each.
        weights: one for each reward; None = 1 each.
        baseline, scale, ddof, eps, flat: as in `group_relative`, for each reward alone.
        singleton: a group with one measured member gets 0 ("zero") or its rewards themselves ("raw").
        unmeasured: a trajectory that lacks one of the rewards is left out, mask False ("drop"), or compared in those it
            has, and left out only without any ("skip").

    Raises:
        ValueError: no reward, one named twice, another number of weights, or a signal with another unit.

    Example:
        >>> r = Rollouts.from_lists([[5], [6], [7]], [0, 0, 0], outcome=[1.0, 0.0, 0.0])
        >>> r = r.with_signals(format=Signal(torch.tensor([10.0, 10.0, 0.0]), "trajectory"))
        >>> credit = decoupled_relative(r, weights=(1.0, 0.5), eps=0.0)
        >>> credit.advantages[:, 0], credit.parts["format"].values
        (tensor([ 1.4434, -0.2887, -1.1547]), tensor([ 0.2887,  0.2887, -0.5774]))
    """
    weight = _weights(rewards, weights)
    values = torch.stack([trajectory_values(rollouts, name, "decoupled_relative") for name in rewards])
    missing = values.isnan()
    if unmeasured == "drop":
        values = values.masked_fill(missing.any(0), torch.nan)
    kinds = torch.arange(len(rewards), device=rollouts.device)[:, None]
    ids = (rollouts.trajectory_groups + rollouts.num_groups * kinds).flatten()
    members = values.flatten()
    stats = group_statistics(members, ids, rollouts.num_groups * len(rewards))
    above = above_baseline(stats, members, baseline)
    advantage = above / scale_of(stats, members, scale, ddof, eps, flat=flat)
    advantage = unless_alone(advantage, members, stats, stats.count == 1, singleton).view(values.shape)
    parts = {name: Signal(w * a, "trajectory") for name, w, a in zip(rewards, weight, advantage, strict=True)}
    several = (stats.count > 1).view(len(rewards), rollouts.num_groups)
    silent = (stats.flat.view(several.shape) & several).sum(1) / several.sum(1).clamp(min=1)
    notes = {f"zero_signal_groups.{name}": float(s) for name, s in zip(rewards, silent, strict=True)}
    mask = measured_mask(rollouts, ~values.isnan().all(0))
    return assemble(rollouts, mask, parts, notes={**notes, "unmeasured": float(missing.any(0).sum())})


def _weights(rewards: tuple[str, ...], weights: tuple[float, ...] | None) -> tuple[float, ...]:
    if not rewards or len(set(rewards)) < len(rewards):
        raise ValueError(f"decoupled_relative needs at least one reward and each once; got {rewards!r}.")
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"decoupled_relative needs a weight for each of {len(rewards)} rewards; got {len(weights)}. "
            "weights=None gives 1 to each."
        )
    return weights if weights is not None else (1.0,) * len(rewards)


@alias
def gdpo(*, rewards: tuple[str, ...] = REWARDS, weights: tuple[float, ...] | None = None) -> Estimator:
    """Group reward-decoupled normalisation: each reward in its group alone, their weighted sum, then the whole batch.

    `A'_i = (A_i - mean_batch) / (std_batch + 1e-4)`, A from `decoupled_relative`; each trajectory counts once.

    Source: GDPO, arXiv 2601.05242, with the deviations and eps of the authors' TRL code (NVlabs/GDPO b080e63); their verl
        code is `.verl()`. Departs: a trajectory that lacks a reward is left out; their code takes it for 0.
    Cost: none beyond the rollouts.

    Example:
        >>> gdpo(weights=(1.0, 0.5))  # doctest: +NORMALIZE_WHITESPACE
        chain(decoupled_relative(rewards=('outcome', 'format'), weights=(1.0, 0.5)),
              whiten(unit='trajectory', eps=0.0001, eps_inside='std'))
    """
    return chain(decoupled_relative(rewards=rewards, weights=weights), _over_trajectories(1e-4))


@dialect(gdpo)
def trl(*, rewards: tuple[str, ...] = REWARDS, weights: tuple[float, ...] | None = None) -> Estimator:
    """TRL's normalize_then_sum: as `gdpo`, but a trajectory is compared in the rewards it has.

    Source: trl 1.16.0, `GRPOTrainer`, `multi_objective_aggregation="normalize_then_sum"`; weights are `reward_weights`.
    Cost: none beyond the rollouts.
    """
    each = decoupled_relative(rewards=rewards, weights=weights, unmeasured="skip")
    return chain(each, _over_trajectories(1e-4))


@dialect(gdpo)
def verl(
    *, rewards: tuple[str, ...] = REWARDS, weights: tuple[float, ...] | None = None, norm_by_std: bool = True
) -> Estimator:
    """verl's gdpo: eps 1e-6 in the group, then all tokens of the batch whitened, `/ sqrt(var + 1e-8)`; alone its rewards.

    Source: verl 0.9.1, `compute_gdpo_outcome_advantage`; settings `gdpo_reward_keys`, `gdpo_reward_weights`.
    Cost: none beyond the rollouts.
    """
    scale: Literal["std"] | None = "std" if norm_by_std else None
    each = decoupled_relative(rewards=rewards, weights=weights, scale=scale, eps=1e-6, singleton="raw")
    return chain(each, whiten())


@dialect(gdpo)
def nemo(*, rewards: tuple[str, ...] = REWARDS, weights: tuple[float, ...] | None = None) -> Estimator:
    """NeMo-RL's gdpo: each reward as in `group_relative.nemo()`, then `(A - mean) / std` over the batch's trajectories.

    Source: NeMo-RL 7ea279a, `GDPOAdvantageEstimator`, with its default settings. Departs: it divides by the deviation
        alone, here 1e-9 is added, which keeps rounding from being divided by rounding.
    Cost: none beyond the rollouts.
    """
    each = decoupled_relative(
        rewards=rewards,
        weights=weights,
        baseline="leave_one_out",
        scale="leave_one_out_std",
        eps=1e-6,
        flat="unscaled",
    )
    return chain(each, _over_trajectories(1e-9))


def _over_trajectories(eps: float) -> Transform:
    return whiten(unit="trajectory", eps=eps, eps_inside="std")

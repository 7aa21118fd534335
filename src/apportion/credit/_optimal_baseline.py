"""Credit above the baseline that makes the gradient's variance smallest, one for each place in the response (OTB)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Estimator, Settings, assemble, dialect, estimator, measured_mask, token_values
from apportion.credit._line import Line, action_line
from apportion.credit._returns import rewards_at_actions
from apportion.functional import at_members, segment_count, segment_max, segment_min, segment_sum, suffix_sum
from apportion.types import Credit, Rollouts, Signal


def _laws(s: Settings) -> tuple[str, ...]:
    compared = s["tail"] == "zero" and s["singleton"] == "zero"
    return ("shift", "equal", "linear") if compared else ("linear",)


@estimator(
    requires=("signals.{reward}", "signals.{sum_pi_squared}", "logprobs"),
    scope="group",
    needs_group_of=lambda s: 2 if s["singleton"] == "zero" else 1,
    laws=_laws,
)
def optimal_token_baseline(
    rollouts: Rollouts,
    *,
    align: Literal["action", "position"] = "action",
    tail: Literal["return", "zero"] = "return",
    singleton: Literal["zero", "raw"] = "zero",
    eps: float = 1e-8,
    sum_pi_squared: str = "sum_pi_squared",
    reward: str = "outcome",
) -> Credit:
    """Return of each action above a weighted mean of the group's returns at the same place of the response.

    `A_t = G_t - B_t`, `B_t = sum G_t W_t / (sum W_t + eps)` over the group's members that have an action at place t,
    `W_t = sum over j <= t of (1 - 2 pi_j + sum pi_j^2)`: how far the gradient's norm has grown, from probabilities alone.

    Source: arXiv 2602.07078, and verl 0.9.1 (`optimal_token_baseline`, `tir_optimal_token_baseline`). Departs: a group
        of one gets 0; the returns are compared above the smallest at their place, so that eps takes nothing off them;
        a term of W is at least (1 - pi)^2, which it cannot be below; weights for off-policy samples are not offered.
    Reads: signals[reward], signals[sum_pi_squared] [B, T], logprobs (old_logprobs first). Scope: group. Unit: token.
    Cost: the sum of squared probabilities at each position, from the forward pass that gives the log-probabilities.
    Laws: equal W give the group's mean; rewards times c give advantages times c. With `tail="zero"` a constant added to
        the rewards changes nothing and equal rewards give 0.
    Degenerate: a group of one measured trajectory 0 (`singleton`); an unmeasured outcome advantage 0 and mask False, and
        no say in B; a position without sum_pi_squared adds nothing to W, counted in notes; an empty response nothing.

    Args:
        rollouts: the batch.
        align: actions are compared that have as many actions before them in their trajectory ("action"), or as many
            positions since its first action, observations counted ("position").
        tail: beyond the group's second-longest response there is nobody to compare with: the return as it is
            ("return"), or 0 ("zero").
        singleton: a group of one gets 0 ("zero") or its returns ("raw").
        eps: keeps the division finite where no member has varied yet.
        sum_pi_squared: signal with the sum over the vocabulary of squared probabilities, at the position of the token drawn.
        reward: a signal per trajectory (on its last action), per span (on the span's last action) or per token.

    Example:
        >>> r = Rollouts.from_lists([[1], [2]], [0, 0], outcome=[1.0, 0.0], logprobs=[[0.5], [0.75]])
        >>> r = r.replace(logprobs=torch.tensor([[0.5], [0.75]]).log())
        >>> r = r.with_signals(sum_pi_squared=Signal(torch.tensor([[0.5], [0.75]]), "token"))
        >>> optimal_token_baseline(r).advantages  # W = 0.5 and 0.25: the baseline is 2/3
        tensor([[ 0.3333],
                [-0.6667]])
    """
    line = action_line(rollouts, observations=align == "position")
    measured, earned = rewards_at_actions(rollouts, line, reward, "optimal_token_baseline")
    value = suffix_sum(earned, line.goes_on.double())
    weight, unmeasured = _path_weights(rollouts, line, sum_pi_squared)
    places = _places(rollouts, line, measured)
    low = segment_min(value, places.ids, places.count)
    y = torch.where(places.ids >= 0, value - at_members(low, places.ids), 0.0)
    total, heavy = (segment_sum(x, places.ids, places.count) for x in (weight * y, weight))
    above = torch.where(heavy > 0, total / (heavy + eps), 0.0)
    baseline = at_members(low + above, places.ids)
    members = segment_count(torch.where(measured, rollouts.trajectory_groups, -1), rollouts.num_groups)
    alone = line.spread((members < 2)[rollouts.trajectory_groups])
    baseline = torch.where(places.lone, value if tail == "zero" else 0.0, baseline)
    baseline = torch.where(alone, value if singleton == "zero" else 0.0, baseline)
    parts = {
        reward: Signal(line.put(line.of_actions(value)), "token"),
        "baseline": Signal(line.put(line.of_actions(-baseline)), "token"),
    }
    notes = {
        "lone_tail": float((places.lone & ~alone).sum()) / max(int((places.ids >= 0).sum()), 1),
        "singleton_groups": float((members == 1).sum()),
        "unmeasured_tokens": float(unmeasured),
    }
    return assemble(rollouts, measured_mask(rollouts, measured), parts, notes=notes)


def _path_weights(rollouts: Rollouts, line: Line, name: str) -> tuple[Tensor, int]:
    """W at each action, and how many actions lack their term."""
    old = rollouts.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
    assert old is not None
    pi = line.take(old).exp()
    squares = line.of_actions(line.take(token_values(rollouts, name, "optimal_token_baseline")))
    term = torch.maximum(1 - 2 * pi + squares, (1 - pi).square())
    term = line.of_actions(torch.where(squares.isnan(), 0.0, term))
    came_before = torch.zeros_like(term)
    came_before[1:] = line.goes_on[:-1].double()
    return suffix_sum(term.flip(0), came_before.flip(0)).flip(0), int(squares.isnan().sum())


@dataclass(frozen=True)
class _Places:
    """Which actions are compared: those of a group at one place of the response.

    Args:
        ids: the place of each action, numbered through all groups; -1 for what is not compared, [M].
        count: how many places there are.
        lone: beyond the second-longest response of the group, [M].
    """

    ids: Tensor
    count: int
    lone: Tensor


def _places(rollouts: Rollouts, line: Line, measured: Tensor) -> _Places:
    group, groups = rollouts.trajectory_groups, rollouts.num_groups
    lengths = line.lengths(rollouts.num_trajectories)
    begin, sizes = lengths.cumsum(0) - lengths, lengths.double()
    members = torch.where(measured, group, -1)
    longest = segment_max(sizes, members, groups).clamp(min=0)
    several = segment_count(torch.where(sizes == longest[group], members, -1), groups) > 1
    shorter = segment_max(torch.where(sizes < longest[group], sizes, 0.0), members, groups).clamp(min=0)
    second = torch.where(several, longest, shorter)
    here = torch.arange(len(line.trajectories), device=rollouts.device)
    compared = line.spread(measured) if line.acts is None else line.spread(measured) & line.acts
    first = (longest.cumsum(0) - longest).long()[group]  # the number of the group's first place
    ids = torch.where(compared, line.spread(first - begin) + here, -1)
    return _Places(ids, int(longest.sum()), compared & (here >= line.spread(second[group].long() + begin)))


@dialect(optimal_token_baseline)
def verl(*, align: Literal["action", "position"] = "position", reward: str = "outcome") -> Estimator:
    """verl 0.9.1 `optimal_token_baseline`; `align="action"` for `tir_optimal_token_baseline`. A group of one is kept.

    With `align="position"` verl measures the second-longest response in actions, here it is in positions, as the places
    are: they agree where no response has an observation in it.
    """
    return optimal_token_baseline(align=align, singleton="raw", reward=reward)

"""Credit weighed by how long an action took (RL for machine learning engineering agents)."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.credit._base import Estimator, alias, transform
from apportion.credit._combine import chain
from apportion.credit._returns import gae
from apportion.functional import segment_any
from apportion.types import Credit, Rollouts, Signal


@transform(requires=("signals.{duration}",), scope="batch")
def weigh_by_duration(
    credit: Credit,
    rollouts: Rollouts,
    *,
    duration: str = "duration",
    normalise: Literal["mean", "none"] = "mean",
    max_weight: float | None = None,
) -> Credit:
    """Give every action the weight of the time it took, where quick actions would otherwise be counted more often.

    `A' = w A` with `w_k = D_k / (mean of D over the batch)`. If in T seconds an action of probability p finishes about
    `p T / D` times, the weight takes D out of its share of the gradient again.

    Source: arXiv 2509.01684. Its bound on the weights: none; `max_weight` is ours.
    Reads: signals[duration], seconds per turn or any other unit. Scope: batch. Unit: that of the signal.
    Cost: a clock around every action.
    Laws: divided by the mean, the weights have mean 1 (before `max_weight`), equal durations change nothing, and
        neither does another clock, all durations times c.
    Degenerate: a duration of 0 or unmeasured counts as the smallest positive one of the batch, and if there is none all
        weights are 1; positions outside every span keep weight 1; spans and trajectories without a counted token are
        not in the mean. All three are in notes, with the effective sample size `(sum w)^2 / sum w^2`.

    Args:
        credit: what to change. rollouts: the batch.
        duration: signal with the seconds each action took.
        normalise: "mean" divides by the batch's mean duration, "none" keeps seconds, which scales the step with them.
        max_weight: upper bound of a weight, for heavy tails.

    Raises:
        ValueError: negative or infinite durations; a max_weight not above 0; several durations each.

    Example:
        >>> import torch
        >>> from apportion.credit import chain, signed_outcome
        >>> from apportion.types import Signal
        >>> r = Rollouts.from_lists([[5], [6]], [0, 0], outcome=[1.0, 0.0],
        ...     signals={"duration": Signal(torch.tensor([3.0, 1.0]), "trajectory")})
        >>> chain(signed_outcome(), weigh_by_duration())(r).advantages
        tensor([[ 1.5000],
                [-0.5000]])
    """
    if max_weight is not None and max_weight <= 0:
        raise ValueError(f"weigh_by_duration needs a max_weight above 0; got {max_weight:g}. None sets no bound.")
    signal = rollouts.signals[duration]
    counted = _counted(credit.mask, rollouts, signal.unit)
    weight, filled = _weights(_seconds(signal, duration, counted), counted, normalise)
    weight = weight if max_weight is None else weight.clamp(max=max_weight)
    ids = rollouts.unit_ids(signal.unit)
    factor = torch.cat([weight, weight.new_ones(1)])[ids]  # -1, in no span, finds the 1 at the end
    w = weight[counted]
    notes = {
        "effective_sample_size": float(w.sum() ** 2 / w.square().sum()) if len(w) else 0.0,
        "largest_weight": float(w.max()) if len(w) else 0.0,
        "unmeasured_durations": float(filled),
        "positions_without_duration": float((credit.mask & (ids < 0)).sum()),
    }
    return replace(credit.scaled(factor, rollouts), notes={**credit.notes, **notes})


def _counted(mask: Tensor, rollouts: Rollouts, unit: str) -> Tensor:
    """Which units have a position in the mask, [U]."""
    if unit == "token":
        return mask.flatten()
    if unit in rollouts.spans:
        spans, before = rollouts.spans[unit], pad(mask.cumsum(1), (1, 0))
        return before[spans.row, spans.stop] > before[spans.row, spans.start]
    rows = {"trajectory": rollouts.trajectory_ids, "group": rollouts.group_ids}.get(unit, rollouts.row_index * 0)
    return segment_any(mask.any(1), rows, rollouts.units(unit))


def _seconds(signal: Signal, name: str, counted: Tensor) -> Tensor:
    """Seconds of each unit, [U], in float64."""
    if signal.values.dim() != (2 if signal.unit == "token" else 1):
        raise ValueError(
            f"weigh_by_duration needs signals[{name!r}] with one duration each; it has the axes {signal.axes}. "
            "Add them up first."
        )
    seconds = signal.values.double().flatten()
    odd = counted & ((seconds < 0) | seconds.isinf())
    if bool(odd.any()):
        raise ValueError(
            f"weigh_by_duration needs finite durations, 0 or more, in signals[{name!r}]; got "
            f"{float(seconds[odd][0]):g}. Use NaN where none was measured, and the limit for an action that ran into it."
        )
    return seconds


def _weights(seconds: Tensor, counted: Tensor, normalise: str) -> tuple[Tensor, int]:
    """The weight of each unit, and how many counted ones had no duration of their own."""
    known = seconds > 0  # False for NaN
    filled = int((counted & ~known).sum())
    if not bool((counted & known).any()):
        return torch.ones_like(seconds), filled
    seconds = torch.where(known, seconds, seconds[counted & known].min())
    return (seconds / seconds[counted].mean() if normalise == "mean" else seconds), filled


@alias
def mle_agents(
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    over: str = "turn",
    max_weight: float | None = None,
    reward: str = "outcome",
    duration: str = "duration",
) -> Estimator:
    """Generalised advantage estimation over turns, each weighed by the time it took.

    Source: arXiv 2509.01684, which trains with PPO; its `gamma` and `lam` are not reported, the defaults are ours.
    Cost: a critic, trained beside the policy, and a clock around every action.

    Example:
        >>> mle_agents()  # doctest: +NORMALIZE_WHITESPACE
        chain(gae(gamma=1.0, lam=0.95, over='turn', reward='outcome'),
        weigh_by_duration(duration='duration', max_weight=None))
    """
    return chain(
        gae(gamma=gamma, lam=lam, over=over, reward=reward),
        weigh_by_duration(duration=duration, max_weight=max_weight),
    )

"""Credit without comparison: the sign of the outcome, and the compositions that weigh its two sides."""

import torch

from apportion.credit._base import Estimator, alias, assemble, estimator, measured_mask, trajectory_values
from apportion.credit._combine import chain
from apportion.credit._transforms import scale_by_sign
from apportion.types import Credit, Rollouts, Signal


@estimator(requires=("signals.{outcome}",))
def signed_outcome(
    rollouts: Rollouts, *, threshold: float = 0.5, low: float = -1.0, high: float = 1.0, outcome: str = "outcome"
) -> Credit:
    """One value for right, one for wrong, on every token, compared with nothing.

    `A = high where outcome >= threshold, else low`.

    Source: arXiv 2506.01347 (rewards +1 and -1, no baseline). The paper's outcomes are binary; the threshold
        for others is ours.
    Reads: signals[outcome]. Scope: row. Unit: trajectory.
    Cost: none beyond the rollouts.
    Laws: other trajectories never matter. It speaks on groups of one and on groups of equal rewards.
    Degenerate: an unmeasured outcome advantage 0 and mask False; an empty response nothing. A truncated response is
        what its verifier says it is.

    Args:
        rollouts: the batch.
        threshold: smallest outcome that counts as right.
        low: advantage of a wrong response.
        high: advantage of a right one.
        outcome: signal with one outcome per trajectory.

    Example:
        >>> r = Rollouts.from_lists([[5], [6, 7]], [0, 0], outcome=[1.0, 0.2])
        >>> signed_outcome(r).advantages
        tensor([[ 1.,  0.],
                [-1., -1.]])
    """
    value = trajectory_values(rollouts, outcome, "signed_outcome")
    measured = ~value.isnan()
    right = value >= threshold
    signed = torch.where(right, high, low).to(torch.float64)
    part = Signal(torch.where(measured, signed, 0.0), "trajectory")
    share = float(right[measured].double().mean()) if bool(measured.any()) else 0.0
    notes = {"right": share, "unmeasured": float((~measured).sum())}
    return assemble(rollouts, measured_mask(rollouts, measured), {outcome: part}, notes=notes)


@alias
def nsr(*, threshold: float = 0.5, outcome: str = "outcome") -> Estimator:
    """Negative sample reinforcement: push wrong responses down, leave right ones out of the batch.

    Source: arXiv 2506.01347.
    Cost: none beyond the rollouts.

    Example:
        >>> nsr()
        chain(signed_outcome(threshold=0.5, outcome='outcome'), scale_by_sign(positive=0.0, drop_zero=True))
    """
    return chain(signed_outcome(threshold=threshold, outcome=outcome), scale_by_sign(positive=0.0, drop_zero=True))


@alias
def psr(*, threshold: float = 0.5, outcome: str = "outcome") -> Estimator:
    """Positive sample reinforcement: push right responses up, leave wrong ones out of the batch.

    Source: arXiv 2506.01347.
    Cost: none beyond the rollouts.

    Example:
        >>> psr()
        chain(signed_outcome(threshold=0.5, outcome='outcome'), scale_by_sign(negative=0.0, drop_zero=True))
    """
    return chain(signed_outcome(threshold=threshold, outcome=outcome), scale_by_sign(negative=0.0, drop_zero=True))


@alias
def w_reinforce(*, positive: float = 0.1, threshold: float = 0.5, outcome: str = "outcome") -> Estimator:
    """Weighted REINFORCE: wrong responses at full weight, right ones at a small one, all kept in the batch.

    Source: arXiv 2506.01347; its lambda is `positive`.
    Cost: none beyond the rollouts.

    Example:
        >>> w_reinforce()
        chain(signed_outcome(threshold=0.5, outcome='outcome'), scale_by_sign(positive=0.1))
    """
    return chain(signed_outcome(threshold=threshold, outcome=outcome), scale_by_sign(positive=positive))

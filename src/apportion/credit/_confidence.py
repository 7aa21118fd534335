"""Credit shaped by the model's own confidence: per response, then per token (UCAS)."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Estimator, alias, token_values, transform
from apportion.credit._combine import chain
from apportion.credit._group import group_relative
from apportion.functional import at_members, group_statistics, segment_any, segment_sum
from apportion.types import Credit, Rollouts


@transform(requires=("signals.{certainty}",), scope="group")
def shape_by_confidence(
    credit: Credit,
    rollouts: Rollouts,
    *,
    b_pos: float = 0.25,
    b_neg: float = 0.35,
    reduce: Literal["mean", "sum"] = "mean",
    scale: Literal["std"] | None = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    limit: float | None = None,
    certainty: str = "self_certainty",
) -> Credit:
    """Amplify what is right and was uncertain, and blame more what is wrong and was confident.

    `A' = A exp(-b_pos Z) where A > 0, A exp(+b_neg Z) where A < 0`, with `Z = (C - mean) / (std + eps)` within the
    group and C the mean (or the sum) of the certainty over a response's counted tokens.

    Source: UCAS, arXiv 2510.10649, stage 1. The paper's words suggest the mean; its released code sums, which lets
        length into the confidence.
    Reads: signals[certainty] [B, T], such as `ln sum exp z - mean z` of the logits. Scope: group. Unit: token.
    Cost: one reduction of the logits in the pass that gives the old log-probabilities.
    Laws: the sign of every advantage is kept; `b_pos = b_neg = 0` changes nothing; a constant added to every certainty
        changes nothing under the mean.
    Degenerate: a group of one, equal confidences, or a response without a measured token: Z = 0, no change. An
        unmeasured token stays out of C, counted in notes.

    Args:
        credit: what to change. rollouts: the batch.
        b_pos: strength where the advantage is above 0.
        b_neg: strength where it is below 0.
        reduce: "mean" over the counted tokens of a response, or the released code's "sum".
        scale: divide by the group's deviation, or not (None), as the rewards of the mean-only variant.
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.
        limit: bound on |Z|. In a group of G it can reach (G-1)/sqrt(G), and the exponential makes that a large factor.
        certainty: token signal; larger means more confident.

    Raises:
        ValueError: the certainty is not one number per token; a limit not above 0.

    Example:
        >>> import torch
        >>> from apportion.credit import chain, signed_outcome
        >>> from apportion.types import Signal
        >>> r = Rollouts.from_lists([[5, 6], [7]], [0, 0], outcome=[1.0, 0.0],
        ...     signals={"self_certainty": Signal(torch.tensor([[1.0, 3.0], [4.0, 0.0]]), "token")})
        >>> chain(signed_outcome(), shape_by_confidence(b_pos=0.5, b_neg=0.5, scale=None))(r).advantages
        tensor([[ 1.6487,  1.6487],
                [-1.6487,  0.0000]])
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"shape_by_confidence needs a limit above 0; got {limit:g}. Set limit=None for no bound.")
    confidence, unmeasured = _confidence(credit, rollouts, certainty, reduce)
    stats = group_statistics(confidence, rollouts.trajectory_groups, rollouts.num_groups)
    divisor = stats.spread(ddof, eps, "std") if scale else torch.ones_like(stats.low)
    z = (stats.y - at_members(stats.mean, stats.ids)) / at_members(divisor, rollouts.trajectory_groups)
    z = torch.where(stats.measured, z, 0.0)
    z = (z if limit is None else z.clamp(-limit, limit))[rollouts.trajectory_ids][:, None]
    factor = torch.where(credit.advantages > 0, (-b_pos * z).exp(), (b_neg * z).exp())
    factor.masked_fill_(credit.advantages == 0, 1.0)  # where exp may be infinite
    notes = {"largest_confidence_z": float(z.abs().max()) if len(z) else 0.0, "unmeasured_certainties": unmeasured}
    return replace(credit.scaled(factor, rollouts), notes={**credit.notes, **notes})


@transform(
    requires=("signals.{logit}",),
    scope="batch",
    laws=lambda s, before: tuple(x for x in before if x in _kept(s["lam"], s["skip_zero_groups"])),
)
def penalise_certainty(
    credit: Credit,
    rollouts: Rollouts,
    *,
    lam: float = 0.05,
    eps: float = 1e-6,
    skip_zero_groups: bool = False,
    logit: str = "sampled_logit",
) -> Credit:
    """Take a little credit from every token in proportion to how large its logit was in the batch.

    `A' = A - lam n`, but never below 0 where A > 0, with `n = (l - min) / (max - min + eps)` over all counted tokens of
    the batch, or n = 1/2 where they are all alike.

    Source: UCAS, arXiv 2510.10649, stage 2, as in its released code.
    Reads: signals[logit] [B, T], the raw logit of the sampled token before the temperature. Scope: batch. Unit: token;
        the difference is the part `certainty`.
    Cost: one gather from the logits in the pass that gives the old log-probabilities.
    Laws: a rewarded token never turns negative; a constant added to all logits changes nothing; `lam = 0` neither.
    Degenerate: it speaks where nothing else does: in a group without any credit (equal rewards, one response) every
        token is pushed down, unless `skip_zero_groups`. An unmeasured token is left as it was, counted in notes.

    Args:
        credit: what to change. rollouts: the batch.
        lam: what the most certain token of the batch loses.
        eps: keeps the division finite.
        skip_zero_groups: leave groups alone in which every advantage is 0; the released code does not.
        logit: token signal.

    Raises:
        ValueError: the logit is not one number per token.

    Example:
        >>> import torch
        >>> from apportion.credit import chain, signed_outcome
        >>> from apportion.types import Signal
        >>> r = Rollouts.from_lists([[5, 6], [7]], [0, 0], outcome=[1.0, 0.0],
        ...     signals={"sampled_logit": Signal(torch.tensor([[8.0, 12.0], [10.0, 0.0]]), "token")})
        >>> chain(signed_outcome(), penalise_certainty(lam=0.5))(r).advantages
        tensor([[ 1.0000,  0.5000],
                [-1.2500,  0.0000]])
    """
    value = token_values(rollouts, logit, "penalise_certainty")
    counted = credit.mask & ~value.isnan()
    touched = counted
    if skip_zero_groups:
        speaks = segment_any((credit.advantages != 0).any(1), rollouts.group_ids, rollouts.num_groups)
        touched = counted & speaks[rollouts.group_ids][:, None]
    before = credit.advantages
    after = before - _between_extremes(value, counted, eps).mul_(lam).masked_fill_(~touched, 0.0)
    after.masked_fill_((before > 0) & (after < 0), 0.0)
    notes = {**credit.notes, "unmeasured_logits": float((credit.mask & ~counted).sum())}
    return replace(credit.replaced(after, "certainty"), notes=notes)


def _confidence(credit: Credit, rollouts: Rollouts, certainty: str, reduce: str) -> tuple[Tensor, float]:
    """C of each response, [N], NaN where no counted token was measured; and how many counted tokens were not."""
    value = token_values(rollouts, certainty, "shape_by_confidence")
    usable = credit.mask & ~value.isnan()
    n = rollouts.num_trajectories
    total = segment_sum(torch.where(usable, value, 0.0).sum(1, dtype=torch.float64), rollouts.trajectory_ids, n)
    count = segment_sum(usable.sum(1).double(), rollouts.trajectory_ids, n)
    confidence = total / count.clamp(min=1) if reduce == "mean" else total
    return torch.where(count > 0, confidence, torch.nan), float(credit.mask.sum() - usable.sum())


def _between_extremes(value: Tensor, counted: Tensor, eps: float) -> Tensor:
    """0 at the smallest counted value, 1 at the largest, 1/2 everywhere if they are alike."""
    if not bool(counted.any()):
        return torch.zeros_like(value, dtype=torch.float64)
    low = torch.where(counted, value, torch.inf).min().double()
    high = torch.where(counted, value, -torch.inf).max().double()
    if bool(torch.isclose(low, high)):
        return torch.full_like(value, 0.5, dtype=torch.float64)
    return (value.double() - low).div_(high - low + eps)


def _kept(lam: float, skip_zero_groups: bool) -> tuple[str, ...]:
    """The laws of the credit before that hold after the penalty, which does not grow with the outcomes."""
    if not lam:
        return ("shift", "equal", "linear", "scale")
    return ("shift", "scale", "equal") if skip_zero_groups else ("shift", "scale")


# ---- named compositions ---------------------------------------------------------------------------------------------


@alias
def ucas(
    *,
    b_pos: float = 0.25,
    b_neg: float = 0.35,
    lam: float = 0.05,
    reduce: Literal["mean", "sum"] = "mean",
    scale: Literal["std"] | None = "std",
    limit: float | None = None,
    skip_zero_groups: bool = False,
    reward: str = "outcome",
) -> Estimator:
    """UCAS: GRPO, shaped by the confidence of the response, then less a penalty on certain tokens.

    Source: arXiv 2510.10649; `reduce="sum"` is its released code, `scale=None` its mean-only variant.
    Cost: two reductions of the logits in the pass that gives the old log-probabilities.

    Example:
        >>> ucas(lam=0.1)  # doctest: +NORMALIZE_WHITESPACE
        chain(group_relative(reward='outcome', scale='std'),
        shape_by_confidence(b_pos=0.25, b_neg=0.35, reduce='mean', scale='std', limit=None),
        penalise_certainty(lam=0.1, skip_zero_groups=False))
    """
    return chain(
        group_relative(reward=reward, scale=scale),
        shape_by_confidence(b_pos=b_pos, b_neg=b_neg, reduce=reduce, scale=scale, limit=limit),
        penalise_certainty(lam=lam, skip_zero_groups=skip_zero_groups),
    )

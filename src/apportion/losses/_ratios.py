"""Ratios of probabilities: the policy as it is now over the one before the update, and that one over the sampler."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.functional import at_members, segment_sum
from apportion.losses._core import Outputs
from apportion.types import Credit, Rollouts

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOG_RATIO_CEILING = 20.0  # exp(20) = 5e8: far beyond any clip, and finite in every dtype
NO_SPANS = ("batch", "group", "trajectory", "")  # units of signals, which no span set can be called


def check_ratio(ratio: str) -> None:
    """Refuse a name that no span set can have."""
    if ratio in NO_SPANS:
        raise ValueError(f"ratio must be 'token', 'sequence' or the name of a span set; got {ratio!r}.")


def check_correction(correction: str, cap: float) -> None:
    """Refuse an unknown correction, or a cap that cuts tokens on which learner and sampler agree."""
    if correction not in get_args(Correction):
        raise ValueError(f"correction must be one of {', '.join(get_args(Correction))}; got {correction!r}.")
    if correction != "none" and not cap >= 1:
        raise ValueError(f"correction_cap must be at least 1, the weight where learner and sampler agree; got {cap}.")


def update_ratio(outputs: Outputs, rollouts: Rollouts, credit: Credit, ratio: str) -> Float[Tensor, "B T"]:
    """`ln rho`, with gradient: new - old of the token, its row or its span; 0 outside the mask. See `PolicyGradient`."""
    gap = _within(credit.mask, outputs.logprobs - _old(outputs, rollouts))
    if ratio == "token":
        return gap
    if ratio != "sequence":
        return _span_sums(gap, rollouts, ratio)
    mean = gap.sum(1, keepdim=True) / credit.mask.sum(1, keepdim=True).clamp(min=1)
    return _within(credit.mask, mean.expand(gap.shape))


def sampler_weights(
    rollouts: Rollouts, credit: Credit, correction: Correction, cap: float
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """`w = exp(old - logprobs)` after the cap, and where the cap changed it. See `PolicyGradient`.

    Raises:
        ValueError: the batch lacks one of the two.
    """
    missing = [name for name in ("old_logprobs", "logprobs") if getattr(rollouts, name) is None]
    if missing:
        raise ValueError(
            f"PolicyGradient(correction={correction!r}) compares rollouts.old_logprobs (the learner's before the update) "
            f"with rollouts.logprobs (the sampler's); this batch lacks {' and '.join(missing)}. Score the rows with the "
            "learner before the update and keep what the sampler recorded, or use correction='none'."
        )
    assert rollouts.old_logprobs is not None
    assert rollouts.logprobs is not None
    gap = _within(credit.mask, rollouts.old_logprobs - rollouts.logprobs)
    if rollouts.off_policy is not None:  # the ratio of these rows is over the sampler's already
        gap = _within(~rollouts.off_policy[:, None], gap)
    if correction.startswith("sequence"):
        gap = _within(credit.mask, gap.sum(1, keepdim=True).expand(gap.shape))
    weight = gap.exp()
    beyond = weight > cap
    kept = torch.zeros_like(weight) if correction.endswith("mask") else torch.full_like(weight, cap)
    return torch.where(beyond, kept, weight), beyond


def _old(outputs: Outputs, rollouts: Rollouts) -> Float[Tensor, "B T"]:
    """The denominator: the learner's before the update; the behaviour's on off-policy rows."""
    old = outputs.logprobs.detach() if rollouts.old_logprobs is None else rollouts.old_logprobs
    if rollouts.off_policy is None:
        return old
    if rollouts.logprobs is None:
        raise ValueError(
            "off-policy rows need rollouts.logprobs, which this batch lacks. Keep the log-probabilities of sampling."
        )
    return torch.where(rollouts.off_policy[:, None], rollouts.logprobs, old)


def _within(mask: Bool[Tensor, "B _"], values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return torch.where(mask, values, torch.zeros_like(values))


def _span_sums(gap: Float[Tensor, "B T"], rollouts: Rollouts, name: str) -> Float[Tensor, "B T"]:
    """At each position the sum over its span; the position's own value outside every span."""
    if name not in rollouts.spans:
        raise ValueError(
            f'PolicyGradient(ratio={name!r}) needs rollouts.spans["{name}"], which this batch lacks (it has '
            f'{", ".join(rollouts.spans) or "none"}). Split the responses first, or use ratio="token".'
        )
    ids = rollouts.span_ids(name).flatten()
    sums = segment_sum(gap.flatten(), ids, len(rollouts.spans[name])).to(gap.dtype)
    return torch.where(ids >= 0, at_members(sums, ids), gap.flatten()).view(gap.shape)

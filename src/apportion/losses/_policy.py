"""The clipped policy gradient and the penalties that keep the policy near a reference or spread out."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.functional import at_members, segment_sum
from apportion.losses._core import Aggregation, Metrics, Outputs, Totals, aggregate, check_aggregation, means, uncounted
from apportion.types import Cover, Credit, Rollouts

NO_SPANS = ("batch", "group", "trajectory", "")  # units of signals, which no span set can be called
LOG_RATIO_CEILING = 20.0  # exp(20) = 5e8: far beyond any clip, and finite in every dtype


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """Clipped policy gradient with one advantage per token.

        rho_t = exp(new_t - old_t)                              ratio="token"
        rho_t = exp(mean over the row's counted t of new - old) ratio="sequence"
        rho_t = exp(sum over the span's counted t of new - old) ratio="macro", or any other span set
        l_t   = max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high))
        l_t   = min(l_t, -A_t dual_clip) where A_t < 0          if dual_clip is given

    Source: arXiv 1707.06347 equation 7 (clip); arXiv 2507.18071 (sequence ratio, as TRL applies it); arXiv 1912.09729
    equation 5 (dual clip); arXiv 2410.02743 (one ratio per macro action). Departs: the lower and the upper clip are set
    apart; the log-ratio is cut at 20, as in verl, so that rho stays finite (beyond it the gradient is 0).
    Reads: old_logprobs (None = on-policy: old is new without gradient, so rho = 1), off_policy with logprobs (on those
    rows old is the behaviour's), credit, the spans of `ratio`. Scope: row.
    Laws: gradient 0 where the clip is active against the advantage; positions outside the mask and advantages of 0
    contribute nothing, whatever stands in the log-probabilities.
    Degenerate: nothing counted gives 0. Several updates per step need old_logprobs, or nothing is ever clipped. A counted
    position outside every span has its own ratio.
    Args:
        clip_low, clip_high: distances from 1; None = no bound on that side.
        ratio: "token", "sequence" (a row), or the name of a span set whose spans have one ratio each, the product of
            those of their tokens. A span counts once per token, and a long one leaves the clip range soon.
        dual_clip: upper bound of the loss of negative advantages, in multiples of |A| (> 1; usually 3); None = off.
        aggregation, horizon: see `aggregate`.
    Metrics (means over the step's tokens; rows that were skipped count 0): policy/clip_low, policy/clip_high (share of
    tokens whose gradient the clip removed), policy/ratio_shift (|rho - 1|), policy/approx_kl (rho - 1 - ln rho), and
    policy/loss.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    ratio: str = "token"
    aggregation: Aggregation = "token_mean"
    dual_clip: float | None = None
    horizon: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[Cover] = "row"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.horizon)
        if self.ratio in NO_SPANS:
            raise ValueError(f"ratio must be 'token', 'sequence' or the name of a span set; got {self.ratio!r}.")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0; got {value}. Use None for no bound on that side.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1; got {self.dual_clip}. Use None to switch it off.")

    @property
    def requires(self) -> tuple[str, ...]:
        """The spans, if a ratio covers each."""
        return () if self.ratio in ("token", "sequence") else (f"spans.{self.ratio}",)

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The term on these rows, and its metrics."""
        log_ratio = _log_ratio(outputs, rollouts, credit, self.ratio)
        adv = credit.advantages
        ratio = torch.where(adv != 0, log_ratio, torch.zeros_like(log_ratio)).clamp(max=LOG_RATIO_CEILING).exp()
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        high = float("inf") if self.clip_high is None else 1 + self.clip_high
        per_token = torch.maximum(-adv * ratio, -adv * ratio.clamp(low, high))
        if self.dual_clip is not None:
            per_token = torch.where(adv < 0, torch.minimum(per_token, -adv * self.dual_clip), per_token)
        loss = aggregate(per_token, credit.mask, totals, self.aggregation, self.horizon)
        seen = log_ratio.detach().exp()
        metrics = means(
            credit.mask,
            totals,
            policy__clip_low=(seen < low) & (adv < 0),
            policy__clip_high=(seen > high) & (adv > 0),
            policy__ratio_shift=(seen - 1).abs(),
            policy__approx_kl=seen - 1 - log_ratio,
        )
        return loss, {"policy/loss": loss.item(), **metrics}

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows whose counted advantages are all 0."""
        return ~(credit.mask & (credit.advantages != 0)).any(1)


@dataclass(frozen=True, kw_only=True)
class KLToReference:
    """Penalty for leaving the reference model, estimated from the sampled tokens.

        d_t = ref_t - new_t
        k3:  exp(d_t) - d_t - 1       never negative; its gradient pulls towards the reference
        k1:  -d_t                     unbiased as a value; as a loss its expected gradient on its own samples is 0

    Source: J. Schulman, "Approximating KL divergence" (2020); TRL and torchforge add k3 to the loss.
    Reads: ref_logprobs, credit.mask. Scope: row.
    Laws: k3 and its gradient are 0 where new equals ref. Degenerate: nothing counted gives 0.
    Args: coef: weight of the term. estimator: "k3" | "k1". aggregation, horizon: see `aggregate`.
    Metrics: kl/reference (the estimate, mean over the step's tokens), kl/loss (with coef).
    """

    coef: float
    estimator: Literal["k3", "k1"] = "k3"
    aggregation: Aggregation = "token_mean"
    horizon: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ("ref_logprobs",)
    scope: ClassVar[Cover] = "row"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.horizon)
        if self.estimator not in ("k3", "k1"):
            raise ValueError(f"estimator must be 'k3' or 'k1'; got {self.estimator!r}.")

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The term on these rows, and its metrics."""
        if rollouts.ref_logprobs is None:
            raise ValueError(
                "KLToReference needs rollouts.ref_logprobs, which this batch lacks. Score the rows with a reference model."
            )
        gap = rollouts.ref_logprobs - outputs.logprobs
        gap = torch.where(credit.mask, gap, torch.zeros_like(gap))
        per_token = -gap if self.estimator == "k1" else gap.exp() - gap - 1
        loss = self.coef * aggregate(per_token, credit.mask, totals, self.aggregation, self.horizon)
        return loss, {"kl/loss": loss.item(), **means(credit.mask, totals, kl__reference=per_token)}

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows with nothing counted; all rows if coef is 0."""
        return uncounted(credit) | (self.coef == 0)


@dataclass(frozen=True, kw_only=True)
class EntropyBonus:
    """Reward for a spread-out policy: loss = -coef * H_t, H in nats.

    Reads: outputs.entropies, credit.mask. Scope: row. Degenerate: nothing counted gives 0.
    Args: coef: weight; negative sharpens the policy. aggregation, horizon: see `aggregate`.
    Metrics: entropy/mean (over the step's tokens), entropy/loss (with coef).
    """

    coef: float
    aggregation: Aggregation = "token_mean"
    horizon: int | None = None
    needs: ClassVar[tuple[str, ...]] = ("entropies",)
    requires: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[Cover] = "row"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.horizon)

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The term on these rows, and its metrics."""
        if outputs.entropies is None:
            raise ValueError('EntropyBonus needs outputs.entropies, which are missing. Ask the policy for "entropies".')
        loss = -self.coef * aggregate(outputs.entropies, credit.mask, totals, self.aggregation, self.horizon)
        return loss, {"entropy/loss": loss.item(), **means(credit.mask, totals, entropy__mean=outputs.entropies)}

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows with nothing counted; all rows if coef is 0."""
        return uncounted(credit) | (self.coef == 0)


def _log_ratio(outputs: Outputs, rollouts: Rollouts, credit: Credit, ratio: str) -> Float[Tensor, "B T"]:
    old = outputs.logprobs.detach() if rollouts.old_logprobs is None else rollouts.old_logprobs
    if rollouts.off_policy is not None:
        if rollouts.logprobs is None:
            raise ValueError(
                "off-policy rows need rollouts.logprobs, which this batch lacks. Keep the log-probabilities of sampling."
            )
        old = torch.where(rollouts.off_policy[:, None], rollouts.logprobs, old)
    gap = outputs.logprobs - old
    gap = torch.where(credit.mask, gap, torch.zeros_like(gap))
    if ratio == "token":
        return gap
    if ratio != "sequence":
        return _span_sums(gap, rollouts, ratio)
    mean = gap.sum(1, keepdim=True) / credit.mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(credit.mask, mean, torch.zeros_like(gap))


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

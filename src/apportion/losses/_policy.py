"""The clipped policy gradient and the penalties that keep the policy near a reference or spread out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.losses._core import Aggregation, Metrics, Outputs, Totals, aggregate, check_aggregation, means, uncounted
from apportion.losses._ratios import (
    LOG_RATIO_CEILING,
    Correction,
    check_correction,
    check_ratio,
    sampler_weights,
    update_ratio,
)
from apportion.types import Cover, Credit, Rollouts

KLEstimator = Literal["k1", "k2", "k3", "abs"]
_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {  # of ref - new
    "k1": lambda gap: -gap,
    "k2": lambda gap: gap.square() / 2,
    "k3": lambda gap: gap.exp() - gap - 1,
    "abs": torch.abs,
}


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """Clipped policy gradient with one advantage per token.

        rho_t = exp(new_t - old_t)                              ratio="token"
        rho_t = exp(mean over the row's counted t of new - old) ratio="sequence"
        rho_t = exp(sum over the span's counted t of new - old) ratio="macro", or any other span set

        l_t   = max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high))         objective="clip"
        l_t   = min(l_t, -A_t dual_clip) where A_t < 0                                 if dual_clip is given
        l_t   = -A_t min(rho_t, 1 + clip_high) new_t, no gradient through the minimum  objective="cispo"

        l_t   = l_t w_t, w_t = exp(old_t - sampled_t)           correction="token_truncate": at most correction_cap
                                                                "token_mask": 0 beyond it
        w_t   = exp(sum over the row's counted t)               "sequence_truncate", "sequence_mask"

    Source: arXiv 1707.06347 equation 7 (clip); arXiv 2507.18071 (sequence ratio, as TRL applies it); arXiv 1912.09729
    equation 5 (dual clip); arXiv 2410.02743 (one ratio per macro action); arXiv 2506.13585 equation 4 (cispo); TRL 1.16
    `vllm_importance_sampling_mode` (correction). Departs: the lower and the upper clip are set apart; the log-ratio is cut
    at 20, as in verl, so that rho stays finite (beyond it the gradient of "clip" is 0); cispo has no lower bound, as the
    paper used it, and its upper one is 1 + clip_high, where TRL's epsilon_high is the bound itself (TRL's 5 is 4 here).
    Reads: old_logprobs (None = on-policy: old is new without gradient, so rho = 1), off_policy with logprobs (on those
    rows old is the behaviour's, and w = 1), logprobs (the sampler's) for a correction, credit, the spans of `ratio`.
    Scope: row.
    Laws: gradient 0 where the clip is active against the advantage; positions outside the mask and advantages of 0
    contribute nothing, whatever stands in the log-probabilities. On-policy, with a ratio per token, the gradients of both
    objectives are equal. Where sampler and learner agree, w = 1.
    Degenerate: nothing counted gives 0. Several updates per step need old_logprobs, or nothing is ever clipped. A counted
    position outside every span has its own ratio. Masked tokens count in the mean.
    Args:
        objective: "clip" drops a token's gradient where its ratio has left the range, "cispo" keeps it with the ratio as a
            bounded weight. The value of "cispo" says nothing: only its gradient does.
        clip_low, clip_high: distances from 1; None = no bound on that side. "cispo" does not read clip_low.
        ratio: "token", "sequence" (a row), or the name of a span set whose spans have one ratio each, the product of
            those of their tokens. A span counts once per token, and a long one leaves the clip range soon.
        dual_clip: upper bound of the loss of negative advantages, in multiples of |A| (> 1; usually 3); None = off.
        correction: what the learner's probability over the sampler's does to the loss, where the two compute differently.
        correction_cap: its largest weight, at least 1. A row's weight is a product over its tokens and varies much more.
        aggregation, horizon: see `aggregate`.
    Metrics (means over the step's tokens; rows that were skipped count 0): policy/clip_low, policy/clip_high (share of
    tokens whose gradient the clip removed; for "cispo" whose weight it cut), policy/ratio_shift (|rho - 1|),
    policy/approx_kl (rho - 1 - ln rho), and policy/loss. With a correction also policy/correction (w after the cap) and
    policy/corrected (share of tokens beyond the cap).
    """

    objective: Literal["clip", "cispo"] = "clip"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    ratio: str = "token"
    aggregation: Aggregation = "token_mean"
    dual_clip: float | None = None
    correction: Correction = "none"
    correction_cap: float = 2.0
    horizon: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[Cover] = "row"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.horizon)
        check_ratio(self.ratio)
        check_correction(self.correction, self.correction_cap)
        if self.objective not in ("clip", "cispo"):
            raise ValueError(f"objective must be 'clip' or 'cispo'; got {self.objective!r}.")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0; got {value}. Use None for no bound on that side.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1; got {self.dual_clip}. Use None to switch it off.")
        if self.dual_clip is not None and self.objective == "cispo":
            raise ValueError(
                f"objective='cispo' bounds every weight by 1 + clip_high, so that dual_clip={self.dual_clip} has nothing "
                "to bound. Leave one of the two out."
            )

    @property
    def requires(self) -> tuple[str, ...]:
        """The spans, if a ratio covers each; both log-probabilities, if the sampler's are corrected."""
        spans = () if self.ratio in ("token", "sequence") else (f"spans.{self.ratio}",)
        return spans if self.correction == "none" else (*spans, "logprobs", "old_logprobs")

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The term on these rows, and its metrics."""
        log_rho, adv = update_ratio(outputs, rollouts, credit, self.ratio), credit.advantages
        moved = credit.mask & (adv != 0)
        rho = torch.where(moved, log_rho, torch.zeros_like(log_rho)).clamp(max=LOG_RATIO_CEILING).exp()
        cispo = self.objective == "cispo"
        low = 0.0 if self.clip_low is None or cispo else 1 - self.clip_low
        high = float("inf") if self.clip_high is None else 1 + self.clip_high
        if cispo:
            new = torch.where(moved, outputs.logprobs, torch.zeros_like(rho))
            per_token = -adv * rho.detach().clamp(max=high) * new
        else:
            per_token = torch.maximum(-adv * rho, -adv * rho.clamp(low, high))
        if self.dual_clip is not None:
            per_token = torch.where(adv < 0, torch.minimum(per_token, -adv * self.dual_clip), per_token)
        seen = log_rho.detach().exp()
        columns = {
            "policy__clip_low": (seen < low) & (adv < 0),
            "policy__clip_high": (seen > high) & (moved if cispo else adv > 0),
            "policy__ratio_shift": (seen - 1).abs(),
            "policy__approx_kl": seen - 1 - log_rho,
        }
        if self.correction != "none":
            weights, beyond = sampler_weights(rollouts, credit, self.correction, self.correction_cap)
            per_token = per_token * torch.where(moved, weights, torch.ones_like(weights))
            columns |= {"policy__correction": weights, "policy__corrected": beyond}
        loss = aggregate(per_token, credit.mask, totals, self.aggregation, self.horizon)
        return loss, {"policy/loss": loss.item(), **means(credit.mask, totals, **columns)}

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows whose counted advantages are all 0."""
        return ~(credit.mask & (credit.advantages != 0)).any(1)


@dataclass(frozen=True, kw_only=True)
class KLToReference:
    """Penalty for leaving the reference model, estimated from the sampled tokens.

        d_t = ref_t - new_t
        k3:  exp(d_t) - d_t - 1       unbiased as a value, never negative; its gradient pulls towards the reference
        k2:  d_t^2 / 2                biased as a value; its expected gradient on its own samples is that of KL(new | ref)
        k1:  -d_t                     unbiased as a value; as a loss its expected gradient on its own samples is 0
        abs: |d_t|                    biased, never negative; pulls with the same strength wherever new is not ref

    Source: J. Schulman, "Approximating KL divergence" (2020); torchforge adds k3 to the loss, verl any of them ("low_var_kl",
    "mse", "kl", "abs"), TRL 1.16 k3 with `weighed` (its `use_bias_correction_kl`, on by default; DeepSeek-V3.2, arXiv
    2512.02556).
    Reads: ref_logprobs, credit.mask; for `weighed` what `PolicyGradient` reads for rho. Scope: row.
    Laws: where new equals ref every estimate is 0, and so is every gradient but that of k1. Weighed, k1 and k3 have the
    expected gradient of KL(new | ref); on-policy that is k2's without weight. Degenerate: nothing counted gives 0.
    Args:
        coef: weight of the term. estimator: "k3" | "k2" | "k1" | "abs".
        weighed: multiply by the token's rho = exp(new - old), with its gradient: what is unbiased for new also on samples
            of old.
        aggregation, horizon: see `aggregate`.
    Metrics: kl/reference (the estimate, mean over the step's tokens), kl/loss (with coef).
    """

    coef: float
    estimator: KLEstimator = "k3"
    weighed: bool = False
    aggregation: Aggregation = "token_mean"
    horizon: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ("ref_logprobs",)
    scope: ClassVar[Cover] = "row"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.horizon)
        if self.estimator not in _ESTIMATES:
            raise ValueError(f"estimator must be one of {', '.join(_ESTIMATES)}; got {self.estimator!r}.")

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
        per_token = _ESTIMATES[self.estimator](gap)
        if self.weighed:
            per_token = per_token * update_ratio(outputs, rollouts, credit, "token").clamp(max=LOG_RATIO_CEILING).exp()
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

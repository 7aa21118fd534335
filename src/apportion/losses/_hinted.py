"""The policy gradient on rollouts of which some were sampled with a hint that the trained prompt lacks (Guide)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.losses._core import Aggregation, Metrics, Outputs, Totals, aggregate, check_aggregation, means
from apportion.losses._policy import PolicyGradient
from apportion.losses._ratios import LOG_RATIO_CEILING
from apportion.types import Cover, Credit, Rollouts


@dataclass(frozen=True, kw_only=True)
class HintedPolicyGradient:
    """Clipped policy gradient on on-policy rows, a shaped importance ratio on rows that were sampled with a hint.

        on-policy: l_t = max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high))         as in PolicyGradient
        hinted:    l_t = -A_t rho_t / (rho_t + g),  rho_t = pi(y_t | prompt, y_<t) / pi_old(y_t | prompt with hint, y_<t)
                   l_t = -A_t rho_t^g                                                           shaping="power"

    The slope g / (rho + g)^2 is largest for tokens that are unlikely without the hint. No gradient flows through g.

    Source: Guide, arXiv 2506.13923, and its released code (`compute_policy_loss`). Departs: the quantile is taken over the
    counted hinted tokens of the whole step, where the code takes it per micro-batch, padding included; rho is cut at e^20.
    Reads: off_policy (the hinted rows; None = none), logprobs (on those rows as sampled, under the hinted prompt; scoring
    them again without the hint would make every rho 1), old_logprobs (on the others, as PolicyGradient), credit. Hinted
    rows belong in groups of their own, so that `grpo` compares them among themselves.
    Scope: batch for "percentile", else row.
    Laws: rho / (rho + g) lies in (0, 1); without hinted rows this is PolicyGradient with the same clip.
    Degenerate: nothing counted gives 0; a step without hinted tokens needs no g.
    Args:
        clip_low, clip_high: of on-policy rows, see `PolicyGradient`.
        shaping: "percentile", g = max(this quantile of rho, 1e-4); "constant", g given; "power".
        g: 0 < g: the quantile (below 1), the constant, or the exponent.
        aggregation, horizon: see `aggregate`; token_mean is the mean over on-policy and hinted tokens together.
    Metrics (means over the step's tokens): those of PolicyGradient over its rows; hinted/tokens (share), hinted/ratio
    (rho), hinted/shaped; and hinted/gamma (g) for "percentile". policy/loss is the whole term.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    shaping: Literal["percentile", "constant", "power"] = "percentile"
    g: float = 0.9
    aggregation: Aggregation = "token_mean"
    horizon: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ("logprobs",)

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.horizon)
        if self.shaping not in ("percentile", "constant", "power"):
            raise ValueError(f"shaping must be 'percentile', 'constant' or 'power'; got {self.shaping!r}.")
        if not self.g > 0 or (self.shaping == "percentile" and not self.g < 1):
            wanted = "between 0 and 1" if self.shaping == "percentile" else "above 0"
            raise ValueError(f"g must be {wanted} for shaping={self.shaping!r}; got {self.g}.")
        _ = self._on_policy  # which checks the clips

    @property
    def scope(self) -> Cover:
        """The quantile runs over the hinted tokens of the whole step."""
        return "batch" if self.shaping == "percentile" else "row"

    @property
    def _on_policy(self) -> PolicyGradient:
        return PolicyGradient(
            clip_low=self.clip_low, clip_high=self.clip_high, aggregation=self.aggregation, horizon=self.horizon
        )

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The term on these rows, and its metrics."""
        if rollouts.logprobs is None:
            raise ValueError(
                "HintedPolicyGradient needs rollouts.logprobs, which this batch lacks. Keep the log-probabilities of "
                "sampling, with the hint in the prompt."
            )
        hinted = credit.mask & _hinted_rows(rollouts)[:, None]
        loss, metrics = self._on_policy(outputs, rollouts, credit.narrowed(~hinted), totals)
        gap = outputs.logprobs - rollouts.logprobs
        log_ratio = torch.where(hinted, gap, torch.zeros_like(gap)).clamp(max=LOG_RATIO_CEILING)
        seen = log_ratio.detach()
        gamma = self._gamma(seen[hinted])
        over = (log_ratio - math.log(gamma)).sigmoid()  # rho / (rho + gamma)
        shaped = (gamma * log_ratio).exp() if self.shaping == "power" else over
        moved = hinted & (credit.advantages != 0)
        per_token = torch.where(moved, -credit.advantages * shaped, torch.zeros_like(shaped))
        loss = loss + aggregate(per_token, hinted, totals, self.aggregation, self.horizon)
        found = means(hinted, totals, hinted__tokens=hinted, hinted__ratio=seen.exp(), hinted__shaped=shaped)
        if self.shaping == "percentile":
            found["hinted/gamma"] = gamma
        return loss, {**metrics, **found, "policy/loss": loss.item()}

    def _gamma(self, log_ratios: Float[Tensor, " M"]) -> float:
        """g, from the log-ratios of the hinted tokens."""
        if self.shaping != "percentile":
            return self.g
        return max(_quantile(log_ratios.double().exp(), self.g), 1e-4) if len(log_ratios) else 1.0

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows whose counted advantages are all 0, but for hinted ones that have a say in the quantile."""
        still = ~(credit.mask & (credit.advantages != 0)).any(1)
        if self.shaping != "percentile":
            return still
        return still & ~(_hinted_rows(rollouts) & credit.mask.any(1))


def _hinted_rows(rollouts: Rollouts) -> Bool[Tensor, " B"]:
    """Rows that were sampled under another prompt."""
    return torch.zeros_like(rollouts.lengths, dtype=torch.bool) if rollouts.off_policy is None else rollouts.off_policy


def _quantile(values: Float[Tensor, " M"], q: float) -> float:
    """Linear interpolation between the order statistics; `torch.quantile` refuses more than 16 million values."""
    ordered = values.sort().values
    place = q * (len(values) - 1)
    below = int(place)
    low, high = ordered[below].item(), ordered[min(below + 1, len(values) - 1)].item()
    return low + (high - low) * (place - below)

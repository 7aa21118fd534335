"""The critic's loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.losses._core import Aggregation, Metrics, Outputs, Totals, aggregate, check_aggregation, means, uncounted
from apportion.types import Cover, Credit, Rollouts


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Squared error of the critic against its returns, with moves away from the old value bounded.

        near_t = V_old_t + clip(V_t - V_old_t, -clip, clip)
        l_t    = coef / 2 * max((V_t - R_t)^2, (near_t - R_t)^2)

    Source: arXiv 2406.09279 (token mean, coef 0.1) and 2401.08967 (mean of row means, coef 5), from their released code.
    Reads: outputs.values, rollouts.values (V_old, only if clip is set), credit.returns, credit.mask. Scope: row.
    Laws: gradient 0 where the bounded error is the larger one and the bound is active.
    Degenerate: nothing counted gives 0.
    Args: coef: weight of the term. clip: bound of one update; None = off. aggregation, horizon: see `aggregate`.
    Metrics: value/loss (with coef), value/error (V - R)^2 and value/clipped, the last two means over the step's tokens.
    """

    coef: float = 0.1
    clip: float | None = 0.2
    aggregation: Aggregation = "token_mean"
    horizon: int | None = None
    needs: ClassVar[tuple[str, ...]] = ("values",)
    scope: ClassVar[Cover] = "row"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.horizon)
        if self.clip is not None and not self.clip >= 0:
            raise ValueError(f"clip must be at least 0; got {self.clip}. Use None for no bound.")

    @property
    def requires(self) -> tuple[str, ...]:
        """The returns of the credit, and the old values if the update is bounded."""
        return ("credit.returns",) if self.clip is None else ("credit.returns", "values")

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The term on these rows, and its metrics."""
        values, returns = _present(outputs, credit)
        error = torch.where(credit.mask, values - returns, torch.zeros_like(values)).square()
        worst, clipped = error, torch.zeros_like(credit.mask)
        if self.clip is not None:
            near = _near(values, rollouts.values, self.clip)
            bounded = torch.where(credit.mask, near - returns, torch.zeros_like(values)).square()
            worst, clipped = torch.maximum(error, bounded), bounded > error
        loss = 0.5 * self.coef * aggregate(worst, credit.mask, totals, self.aggregation, self.horizon)
        return loss, {
            "value/loss": loss.item(),
            **means(credit.mask, totals, value__error=error, value__clipped=clipped),
        }

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows with nothing counted; all rows if coef is 0."""
        return uncounted(credit) | (self.coef == 0)


def _present(outputs: Outputs, credit: Credit) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    if outputs.values is None:
        raise ValueError('ValueLoss needs outputs.values, which are missing. Train with a critic and ask for "values".')
    if credit.returns is None:
        raise ValueError("ValueLoss needs credit.returns, which this credit lacks. Use an estimator such as gae.")
    return outputs.values, credit.returns


def _near(values: Float[Tensor, "B T"], old: Float[Tensor, "B T"] | None, clip: float) -> Float[Tensor, "B T"]:
    if old is None:
        raise ValueError("ValueLoss needs rollouts.values to bound the update, which this batch lacks. Use clip=None.")
    return old + (values - old).clamp(-clip, clip)

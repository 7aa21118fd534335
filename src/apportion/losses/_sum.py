"""Several terms as one loss."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.losses._core import Loss, Metrics, Outputs, Totals
from apportion.types import Cover, Credit, Rollouts


@dataclass(frozen=True, repr=False)
class LossSum:
    """The sum of its terms; flat on a row only where every term is. Made by `add_losses`."""

    terms: tuple[Loss, ...]

    def __repr__(self) -> str:
        return f"add_losses({', '.join(map(repr, self.terms))})"

    @property
    def needs(self) -> tuple[str, ...]:
        """Everything a term needs."""
        return tuple(sorted({x for term in self.terms for x in term.needs}))

    @property
    def requires(self) -> tuple[str, ...]:
        """Everything a term requires."""
        return tuple(sorted({x for term in self.terms for x in term.requires}))

    @property
    def scope(self) -> Cover:
        """The widest scope of a term."""
        widths: tuple[Cover, ...] = ("row", "group", "batch")
        return max((term.scope for term in self.terms), key=widths.index)

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The sum on these rows; the metrics of all terms, and "loss"."""
        results = [term(outputs, rollouts, credit, totals) for term in self.terms]
        loss = torch.stack([value for value, _ in results]).sum()
        return loss, {"loss": loss.item(), **{k: v for _, metrics in results for k, v in metrics.items()}}

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows on which every term is flat: a learner may skip exactly these."""
        return torch.stack([term.flat_rows(rollouts, credit) for term in self.terms]).all(0)


def add_losses(*terms: Loss) -> LossSum:
    """Several terms as one loss, each with its own weight and aggregation.

    Example:
        >>> from apportion.losses import KLToReference, PolicyGradient
        >>> add_losses(PolicyGradient(), KLToReference(coef=0.01)).requires
        ('ref_logprobs',)

    Raises: ValueError without a term, or with two of one kind (their metrics would mix).
    """
    kinds = [type(term).__name__ for term in terms]
    if not terms:
        raise ValueError("add_losses needs at least one term; got none. Start with PolicyGradient().")
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"add_losses got {kinds.count(kind)} terms of kind {kind}. Give one term of each kind.")
    return LossSum(terms)

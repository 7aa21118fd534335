"""How well verdicts agree with labels."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Counts of verdicts against labels, one number or one per subgoal, and the measures made of them.

    A measure that is undefined is 0: precision without a positive verdict, recall without a positive label, F1 without
    either, accuracy without a labelled cell.

    Args:
        true_positive, false_positive, false_negative, true_negative: cells by verdict and label.
        unusable: labelled cells without a verdict; they are counted as negative verdicts too, as credit reads them.
    """

    true_positive: Float[Tensor, "..."]
    false_positive: Float[Tensor, "..."]
    false_negative: Float[Tensor, "..."]
    true_negative: Float[Tensor, "..."]
    unusable: Float[Tensor, "..."]

    @property
    def precision(self) -> Float[Tensor, "..."]:
        """Of the positive verdicts, the share that is right."""
        return self.true_positive / (self.true_positive + self.false_positive).clamp(min=1)

    @property
    def recall(self) -> Float[Tensor, "..."]:
        """Of the positive labels, the share that was found."""
        return self.true_positive / (self.true_positive + self.false_negative).clamp(min=1)

    @property
    def f1(self) -> Float[Tensor, "..."]:
        """Harmonic mean of precision and recall; what to look at where most cells are negative."""
        wrong = self.false_positive + self.false_negative
        return 2 * self.true_positive / (2 * self.true_positive + wrong).clamp(min=1)

    @property
    def accuracy(self) -> Float[Tensor, "..."]:
        """The share of cells that agree."""
        right = self.true_positive + self.true_negative
        return right / (right + self.false_positive + self.false_negative).clamp(min=1)

    @property
    def pooled(self) -> "Agreement":
        """Over the cells of all subgoals together."""
        return Agreement(
            self.true_positive.sum(),
            self.false_positive.sum(),
            self.false_negative.sum(),
            self.true_negative.sum(),
            self.unusable.sum(),
        )


def agreement(verdicts: Float[Tensor, "S m"], labels: Float[Tensor, "S m"]) -> Agreement:
    """Compare verdicts with labels, per subgoal; `.pooled` for all of them together.

    Args:
        verdicts: 1 = the judge says that the turn achieved the subgoal, 0 = not, NaN = unusable, [S, m].
        labels: 1 = it did, 0 = it did not, NaN = not labelled: that cell is left out, [S, m].

    Raises:
        ValueError: two shapes.

    Example:
        >>> import torch
        >>> found = agreement(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> found.precision, found.pooled.accuracy
        (tensor([0.5000, 1.0000], dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """
    if verdicts.shape != labels.shape:
        raise ValueError(
            f"agreement needs one label per verdict; got {list(labels.shape)} labels for {list(verdicts.shape)} verdicts."
        )
    yes, labelled, true = verdicts == 1, ~labels.isnan(), labels == 1

    def count(cells: Tensor) -> Tensor:
        return (cells & labelled).sum(0).double()

    return Agreement(
        true_positive=count(yes & true),
        false_positive=count(yes & ~true),
        false_negative=count(~yes & true),
        true_negative=count(~yes & ~true),
        unusable=count(verdicts.isnan()),
    )

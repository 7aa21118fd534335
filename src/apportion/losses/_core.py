"""What every loss reads and how token losses become one number.

A term is a frozen object: `term(outputs, rollouts, credit, totals) -> (scalar, metrics)`. Its `repr` is the expression
that made it. A sequence is a row. `totals` count the whole step, so losses and metrics of micro-batches add up to those
of the batch: loss(batch) = sum over micro-batches of loss(micro-batch), and the same holds for every metric.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.types import Cover, Credit, Rollouts

Aggregation = Literal[
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "group_mean_token_mean",
    "token_sum_norm",
]
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Outputs:
    """What the policy says now about each position, with gradient; entry t belongs to `tokens[:, t]`.

    Args:
        logprobs: log-probability of the taken action in nats, [B, T].
        values: V of the state before position t, [B, T]; None = not asked for.
        entropies: entropy of the distribution at position t in nats, [B, T]; None = not asked for.
    """

    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None = None
    entropies: Float[Tensor, "B T"] | None = None


@dataclass(frozen=True)
class Totals:
    """Counts over the whole step. Micro-batches divide by these, never by their own counts.

    Args:
        tokens: positions in `credit.mask`.
        rows: all rows, B.
        counted_rows: rows with at least one position in `credit.mask`.
        counted_groups: groups with at least one position in `credit.mask`.
        group_tokens: for each row, positions in `credit.mask` of its whole group, [B]. Only "group_mean_token_mean"
            reads it; cut it with the rows (`take`).
    """

    tokens: int
    rows: int
    counted_rows: int
    counted_groups: int
    group_tokens: Int[Tensor, " B"]

    def take(self, rows: Int[Tensor, " R"]) -> "Totals":
        """The same totals, beside a micro-batch made of these rows."""
        return replace(self, group_tokens=self.group_tokens[rows])


def totals_of(rollouts: Rollouts, credit: Credit) -> Totals:
    """Count a whole step once, before it is cut into micro-batches.

    Example:
        >>> rollouts = Rollouts.from_lists([[5, 6], [7]], [0, 0])
        >>> totals = totals_of(rollouts, Credit(torch.zeros(2, 2), rollouts.action_mask))
        >>> totals.tokens, totals.rows
        (3, 2)
    """
    per_row = credit.mask.sum(1)
    per_group = per_row.new_zeros(rollouts.num_groups).index_add_(0, rollouts.group_ids, per_row)
    return Totals(
        tokens=int(per_row.sum()),
        rows=rollouts.batch,
        counted_rows=int((per_row > 0).sum()),
        counted_groups=int((per_group > 0).sum()),
        group_tokens=per_group[rollouts.group_ids],
    )


@runtime_checkable
class Loss(Protocol):
    """One term of a loss. `needs`: optional fields of `Outputs` it reads. `requires`: fields of `Rollouts` or `Credit`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Optional fields of `Outputs` to be computed with gradient: "values", "entropies"."""

    @property
    def requires(self) -> tuple[str, ...]:
        """What must be present besides: "ref_logprobs", "values", "credit.returns"."""

    @property
    def scope(self) -> Cover:
        """How much of the step must lie in one micro-batch: "row" | "group" | "batch"."""

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The term on these rows, and its metrics."""

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        """Rows on which the term's gradient is zero whatever the policy says."""


def aggregate(
    per_token: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    totals: Totals,
    aggregation: Aggregation = "token_mean",
    horizon: int | None = None,
) -> Float[Tensor, ""]:
    """Token losses l to one number. Rows without a counted position count only in "token_sum_norm".

    | aggregation              | equation                                   | known elsewhere as                                |
    |--------------------------|--------------------------------------------|---------------------------------------------------|
    | token_mean               | sum l / tokens of the step                 | TRL dapo, verl token-mean, SkyRL token_mean       |
    | sequence_mean_token_mean | mean over rows of (mean over tokens of l)  | TRL grpo, verl seq-mean-token-mean, ReFT          |
    | sequence_mean_token_sum  | mean over rows of (sum over tokens of l)   | TRL luspo, verl seq-mean-token-sum                |
    | group_mean_token_mean    | mean over groups of (mean over tokens of l)| SkyRL prompt_mean                                 |
    | token_sum_norm           | sum l / (all rows x horizon)               | Dr. GRPO, TRL dr_grpo, verl seq-mean-token-sum-norm|

    TRL bnpo (mean over the tokens of one micro-batch) is left out: its value depends on how the step is cut.

    Reads: totals, mask. Scope: row. Unit: batch.
    Laws: the values of micro-batches add up to the value of the batch; what stands outside the mask changes nothing,
    NaN included.
    Degenerate: nothing counted gives 0.
    Args: horizon: the constant length of "token_sum_norm", usually the largest number of new tokens.
    Raises: ValueError for an unknown name, a missing horizon, or totals of other rows.
    """
    check_aggregation(aggregation, horizon)
    sums = torch.where(mask, per_token, torch.zeros_like(per_token)).sum(1)
    if aggregation == "token_mean":
        return sums.sum() / max(totals.tokens, 1)
    if aggregation == "sequence_mean_token_mean":
        return (sums / mask.sum(1).clamp(min=1)).sum() / max(totals.counted_rows, 1)
    if aggregation == "sequence_mean_token_sum":
        return sums.sum() / max(totals.counted_rows, 1)
    if aggregation == "group_mean_token_mean":
        if totals.group_tokens.shape != sums.shape:
            raise ValueError(
                f"group_mean_token_mean needs totals of the same rows: totals have {len(totals.group_tokens)} rows, the "
                f"micro-batch has {len(sums)}. Pass totals.take(rows)."
            )
        return (sums / totals.group_tokens.clamp(min=1)).sum() / max(totals.counted_groups, 1)
    return sums.sum() / max(totals.rows * (horizon or 1), 1)


def check_aggregation(aggregation: str, horizon: int | None) -> None:
    """Refuse an unknown aggregation, or "token_sum_norm" without its horizon."""
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation must be one of {', '.join(get_args(Aggregation))}; got {aggregation!r}.")
    if aggregation == "token_sum_norm" and (horizon is None or horizon < 1):
        raise ValueError(
            f"aggregation 'token_sum_norm' needs a positive horizon; got {horizon}. Give the largest number of new tokens."
        )


def uncounted(credit: Credit) -> Bool[Tensor, " B"]:
    """Rows with no position in the mask: flat for every term."""
    return ~credit.mask.any(1)


def means(mask: Bool[Tensor, "B T"], totals: Totals, **columns: Tensor) -> dict[str, float]:
    """Each column summed over the mask, divided by the tokens of the whole step: floats that add up over micro-batches."""
    names = [name.replace("__", "/") for name in columns]
    sums = [torch.where(mask, x.detach().double(), 0.0).sum() for x in columns.values()]
    return dict(zip(names, (torch.stack(sums) / max(totals.tokens, 1)).tolist(), strict=True))

"""Scores of reward models as utilities: the logarithm of how likely an output is good, so that sums mean "and"."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from apportion.types import Rollouts, Signal

_USEFUL = (0.05, 0.95)


def log_goodness(score: Float[Tensor, "..."], reference: float | Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """How likely an output is better than the reference, as a logarithm: `u = ln sigmoid(score - reference)`.

    Source: arXiv 2402.00742. For a Bradley-Terry reward model the sigmoid is the probability of winning against the
    reference output.
    Laws: the slope is `1 - sigmoid(score - reference)`: about 1 far below the reference, about 0 far above it. A very high
    reference gives `score - reference`, a very low one 0. Exact at any distance: no overflow at 1e4.
    Degenerate: NaN stays NaN.

    Example:
        >>> log_goodness(torch.tensor([0.0, 2.0, -50.0]), 2.0)
        tensor([ -2.1269,  -0.6931, -52.0000])
    """
    return logsigmoid(score - reference)


def quantile_reference(scores: Float[Tensor, "... K"], q: float = 0.85) -> Float[Tensor, "..."]:
    """The q-quantile of the start policy's scores on each prompt, linear between order statistics; NaN scores stay out.

    Compute it once, from the policy before training (32 samples are the default here), and keep it with the prompt: a
    reference that moves with the policy moves the goal. 0.85 is, as far as we know, the paper's choice for helpfulness.

    Source: arXiv 2402.00742.

    Example:
        >>> quantile_reference(torch.tensor([-0.5, 0.0, 0.3, 0.8, 1.2, 1.5, 2.0]).double())
        tensor(1.5500, dtype=torch.float64)
    """
    return scores.nanquantile(q, dim=-1)


def rule_utility(passed: Bool[Tensor, "..."] | Float[Tensor, "..."], *, failed: float = 0.01) -> Float[Tensor, "..."]:
    """The utility of a rule that is kept or broken: 0 where it is 1, `ln failed` where it is 0, a share between.

    A score in {0, 1} is no Bradley-Terry logit, so it needs this map instead of `log_goodness`. The paper gives no value
    for `failed`, how good an output that breaks the rule still is; the default is ours.

    Example:
        >>> rule_utility(torch.tensor([1.0, 0.0]))
        tensor([ 0.0000, -4.6052])
    """
    score = passed if passed.is_floating_point() else passed.float()
    return (1 - score) * math.log(failed) + 0.0  # + 0.0 turns -0.0 into 0


@dataclass(frozen=True, kw_only=True)
class Utility:
    """The signal "utility" from the scores of one or more reward models: high only where every property is good.

        P_k = sigmoid(r_k - reference_k),  u = sum of weight_k ln P_k

    With weights 1, u is the logarithm of the probability that all properties are good, if they are independent. It is a
    reward like any other: `group_relative(reward="utility")`. The optimum of E[u] - gamma KL(pi || pi_0) is
    pi_0 times the product of P_k^(1/gamma), normalised. Several models of one property are not independent: average their
    scores first.

    Source: arXiv 2402.00742.
    Reads: signals[r] of one number per trajectory for r in `rewards`, and the references that are named. Scope: row.
    Unit: trajectory.
    Degenerate: a score or reference that was not measured makes the utility NaN. A property whose mean P lies outside
    0.05 to 0.95 warns: there the transform is a straight line, or flat.

    Args:
        rewards: signals with the scores, on the Bradley-Terry scale (logits).
        references: for each a number, or the name of a signal per group (see `quantile_reference`) or per trajectory (the
            score of a fixed answer). One number for all prompts rewards easy prompts.
        weights: for each property; () = all 1.

    Raises:
        ValueError: other numbers of references or weights than rewards; signals of other units.

    Example:
        >>> scores = {"help": Signal(torch.tensor([0.0, 5.0]), "trajectory"), "calm": Signal(torch.zeros(2), "trajectory")}
        >>> r = Rollouts.from_lists([[1], [2]], [0, 0], signals=scores)
        >>> Utility(rewards=("help", "calm"), references=(1.0, 0.0)).measure(r)["utility"].values
        tensor([-2.0064, -0.7113])
    """

    rewards: tuple[str, ...]
    references: tuple[float | str, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("references", "weights"):
            given = getattr(self, name)
            if len(given) != len(self.rewards) and (given or name == "references"):
                raise ValueError(
                    f"Utility needs one of {name} for each of the {len(self.rewards)} rewards; got {len(given)}."
                )

    @property
    def provides(self) -> tuple[str, ...]:
        """The utility, and the P of each property, [N, properties]."""
        return ("signals.utility", "signals.goodness")

    @property
    def requires(self) -> tuple[str, ...]:
        """The scores and the references that are measured."""
        named = [r for r in self.references if isinstance(r, str)]
        return tuple(f"signals.{name}" for name in (*self.rewards, *named))

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"utility": [N], "goodness": [N, properties]}`."""
        utilities = [
            log_goodness(
                _per_trajectory(rollouts, r), x if isinstance(x, float | int) else _per_trajectory(rollouts, x)
            )
            for r, x in zip(self.rewards, self.references, strict=True)
        ]
        columns = torch.stack(utilities, 1)
        weights = torch.tensor(self.weights or [1.0] * len(self.rewards), dtype=columns.dtype, device=columns.device)
        _warn_of_saturation(columns, self.rewards)
        return {
            "utility": Signal((columns * weights).sum(1), "trajectory"),
            "goodness": Signal(columns.exp(), "trajectory", ("properties",)),
        }


def _per_trajectory(rollouts: Rollouts, name: str) -> Float[Tensor, " N"]:
    """A signal per trajectory or group, as one value per trajectory."""
    signal = rollouts.signals[name]
    if signal.unit not in ("trajectory", "group") or signal.values.dim() != 1:
        raise ValueError(
            f"Utility needs signals[{name!r}] with one number per trajectory or group; got unit {signal.unit!r} and "
            f"shape {list(signal.values.shape)}. Aggregate it first, averaging several models of one property."
        )
    return signal.values[rollouts.trajectory_groups] if signal.unit == "group" else signal.values


def _warn_of_saturation(utilities: Float[Tensor, "N K"], names: Sequence[str]) -> None:
    for name, mean in zip(names, utilities.double().exp().nanmean(0).tolist(), strict=True):
        if not _USEFUL[0] <= mean <= _USEFUL[1] and not math.isnan(mean):
            warnings.warn(
                f"the mean of sigmoid({name} - reference) is {mean:.3g}: the reference is out of reach or always passed, "
                "and the transform is nearly straight or flat. Choose another reference.",
                stacklevel=3,
            )

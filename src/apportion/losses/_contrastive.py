"""What makes the states of a reward model tell good from bad headings: states of good responses attract, bad ones repel."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from apportion.losses._core import Metrics


def contrastive_loss(
    source: Float[Tensor, "E S D"],
    goal: Float[Tensor, "E S D"],
    other: Float[Tensor, "E S D"],
    rejected: Float[Tensor, "E S D"],
    *,
    beta: float = 0.5,
    average_goal: bool = False,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Earlier states of a preferred response should point where its later ones are, and away from a rejected response.

        pos  = mean of sigmoid(cos(source, goal)),  neg = mean of sigmoid(cos(other, rejected))
        loss = beta (-ln pos - ln(1 - neg))

    The means run over all examples and, within each, over all S x S combinations; they stand inside the logarithm, so the
    loss of a batch is not the mean of the losses of its parts: keep parts equal, or gather the states first.

    Source: arXiv 2407.13887, and its code (`ContrastiveGoalLoss`).
    Laws: only directions of states matter; 0.626523 beta <= loss, as both sigmoids lie in [0.268941, 0.731059].
    Degenerate: no examples give 0; a state of 0 has cosine 0 with every other.

    Args:
        source: states of the preferred responses, each before its goal, [E, S, D].
        goal: later states of the same, [E, S, D].
        other: further states of the preferred responses, [E, S, D].
        rejected: states of the rejected responses, [E, S, D].
        beta: weight.
        average_goal: use the mean of the S goals, and of the S rejected states, instead of each.

    Returns:
        The loss, and contrast/positive (pos), contrast/negative (neg), contrast/loss.

    Example:
        >>> e = torch.eye(2)[None]
        >>> loss, metrics = contrastive_loss(e[:, :1], e[:, :1], e[:, :1], e[:, 1:])
        >>> round(metrics["contrast/positive"], 6), metrics["contrast/negative"]
        (0.731059, 0.5)
    """
    if not len(source):
        return source.sum(), {"contrast/positive": 0.0, "contrast/negative": 0.0, "contrast/loss": 0.0}
    if average_goal:
        goal, rejected = goal.mean(1, keepdim=True), rejected.mean(1, keepdim=True)
    positive, negative = _closeness(source, goal), _closeness(other, rejected)
    loss = beta * (-positive.log() - (1 - negative).log())
    return loss, {
        "contrast/positive": positive.item(),
        "contrast/negative": negative.item(),
        "contrast/loss": loss.item(),
    }


def _closeness(a: Float[Tensor, "E S D"], b: Float[Tensor, "E Q D"]) -> Float[Tensor, ""]:
    """Mean of sigmoid(cosine) over every state of a with every state of b of the same example."""
    return (normalize(a, dim=2) @ normalize(b, dim=2).mT).sigmoid().mean()


@dataclass(frozen=True)
class StatePositions:
    """Which tokens of the responses give the states of `contrastive_loss`, counted from the response's first, [E, S] each.

    With the states of all positions, `states[torch.arange(E)[:, None], positions.source]` are the sources.
    """

    source: Int[Tensor, "E S"]
    goal: Int[Tensor, "E S"]
    other: Int[Tensor, "E S"]
    rejected: Int[Tensor, "E S"]


def draw_positions(
    chosen_lengths: Int[Tensor, " E"],
    rejected_lengths: Int[Tensor, " E"],
    generator: torch.Generator,
    *,
    samples: int = 16,
    source_percentile: float = 0.0,
    goal_percentile: float = 0.0,
    rejected_from: Int[Tensor, " E"] | None = None,
) -> StatePositions:
    """Draw S positions of each kind for each pair of responses; every source lies before its goal.

    Source: arXiv 2407.13887: source and goal are two sorted uniform draws. Departs: they never fall on the same token, and
    a percentile p keeps to the last 1 - p of the response; in the released code, as read, it keeps to the first. Both
    defaults are 0, where they agree.

    Args:
        chosen_lengths: tokens of the preferred responses, at least 2, [E].
        rejected_lengths: tokens of the rejected responses, at least 1, [E].
        generator: the source of randomness; its device is where the positions are drawn.
        samples: S.
        source_percentile: where sources (and other states) begin, as a share of the response, 0 <= p < 1.
        goal_percentile: where goals (and rejected states) begin.
        rejected_from: first token at which the rejected response differs from the preferred one: before it both have the
            same states, which would be pulled apart; None = 0.

    Raises:
        ValueError: a percentile outside 0 <= p < 1; a response that is too short.

    Example:
        >>> drawn = draw_positions(torch.tensor([2]), torch.tensor([1]), torch.Generator().manual_seed(0), samples=2)
        >>> drawn.source.tolist(), drawn.goal.tolist(), drawn.rejected.tolist()
        ([[0, 0]], [[1, 1]], [[0, 0]])
    """
    for name, p in (("source_percentile", source_percentile), ("goal_percentile", goal_percentile)):
        if not 0 <= p < 1:
            raise ValueError(f"draw_positions needs 0 <= {name} < 1; got {p:g}. 0 draws anywhere.")
    start = torch.zeros_like(rejected_lengths) if rejected_from is None else rejected_from
    if bool((chosen_lengths < 2).any()) or bool((rejected_lengths - start < 1).any()):
        raise ValueError(
            "draw_positions needs two tokens in a preferred response and one in a rejected one, from rejected_from on. "
            "Leave shorter pairs out."
        )
    device = generator.device
    uniform = torch.rand(4, len(chosen_lengths), samples, generator=generator, device=device, dtype=torch.float64)
    pair = uniform[:2].sort(0).values
    early, late = _from(source_percentile, pair[0]), _from(goal_percentile, pair[1])
    length = chosen_lengths.to(device)[:, None]
    first, left = start.to(device)[:, None], (rejected_lengths - start).to(device)[:, None]
    return StatePositions(
        source=(early * (length - 1)).long(),
        goal=(torch.maximum(early, late) * (length - 1)).long() + 1,
        other=(_from(source_percentile, uniform[2]) * length).long(),
        rejected=first + (_from(goal_percentile, uniform[3]) * left).long(),
    )


def _from(percentile: float, uniform: Tensor) -> Tensor:
    """A uniform draw from [0, 1) as one from [percentile, 1)."""
    return percentile + (1 - percentile) * uniform

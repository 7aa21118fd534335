"""What a model's logits say about each token that was chosen, and how near its states are to a goal."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.functional import self_certainty

TOKEN_STATISTICS = ("entropy", "self_certainty", "sampled_logit", "sum_pi_squared")
"""The signals that `token_statistics` reads off the logits."""


def token_statistics(
    logits: Float[Tensor, "M V"], ids: Int[Tensor, " M"], *, names: Sequence[str], temperature: float = 1.0
) -> dict[str, Float[Tensor, " M"]]:
    """Statistics of the distribution that each token was drawn from, by name and in the order asked for.

    With the logits z before the temperature and `p = softmax(z / temperature)`:

        entropy         -sum p ln p                                in nats
        self_certainty  ln sum exp(z / temperature) - mean(z / temperature)
        sampled_logit   z of the chosen token                      before the temperature
        sum_pi_squared  sum p^2                                    the chance that two draws agree

    Source: UCAS, arXiv 2510.10649, and its code (self_certainty, sampled_logit, and which of them the temperature touches).
    Degenerate: temperature 0 (greedy) reads all of them at temperature 1, as the sampler reads log-probabilities.

    Args:
        logits: finite, before the temperature.
        ids: the chosen tokens.
        names: some of `TOKEN_STATISTICS`.
        temperature: of the sampling.

    Example:
        >>> z = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
        >>> token_statistics(z, torch.tensor([0, 3]), names=("self_certainty", "sampled_logit"))
        {'self_certainty': tensor([1.9673, 1.3863]), 'sampled_logit': tensor([2., 0.])}
    """
    scaled = logits / (temperature or 1.0)
    read = {
        "entropy": lambda: entropy(scaled),
        "self_certainty": lambda: self_certainty(scaled),
        "sampled_logit": lambda: logits.gather(1, ids[:, None])[:, 0],
        "sum_pi_squared": lambda: torch.softmax(scaled, 1).square().sum(1),
    }
    return {name: read[name]() for name in names}


def entropy(logits: Float[Tensor, "*D V"]) -> Float[Tensor, "*D"]:
    """Entropy of `softmax(logits)` in nats.

    Example:
        >>> entropy(torch.tensor([0.0, 0.0]))
        tensor(0.6931)
    """
    return logits.logsumexp(-1) - (torch.softmax(logits, -1) * logits).sum(-1)


def goal_cosine(states: Float[Tensor, "*D H"], goal: Float[Tensor, " H"]) -> Float[Tensor, "*D"]:
    """Cosine between hidden states and a goal state: how much it looks from here as if the goal will be reached.

    Source: arXiv 2407.13887: the goal is the mean last state of preferred responses.
    Degenerate: a state or goal of length 0 has cosine 0.

    Example:
        >>> goal_cosine(torch.tensor([[1.0, 0.2], [-0.1, 1.0]]), torch.tensor([1.0, 0.5]))
        tensor([0.9648, 0.3560])
    """
    return torch.nn.functional.cosine_similarity(states, goal, dim=-1)

"""What can be read off the logits of one position."""

import torch
from jaxtyping import Float
from torch import Tensor


def self_certainty(logits: Float[Tensor, "*D V"]) -> Float[Tensor, "*D"]:
    """How far the distribution is from uniform: `ln sum exp z - mean z`, which is `KL(uniform, p) + ln V`.

    A constant added to all logits changes nothing; the temperature does. In the dtype of the logits.

    Source: UCAS, arXiv 2510.10649, and its code.

    Example:
        >>> self_certainty(torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]]))
        tensor([1.9673, 1.3863])
    """
    return torch.logsumexp(logits, dim=-1) - logits.mean(dim=-1)

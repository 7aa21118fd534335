"""What single measurements of tokens are read as: a contrast as a reward, a value below a threshold as the end."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def contrast_reward(contrast: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A log-ratio as a bounded token reward: `sigmoid(contrast) - 1/2`, in [-1/2, 1/2] however large the ratio.

    Source: T-REG, arXiv 2412.02685: `contrast` is ln p of the token after a prompt that asks for a better response, minus
    ln p after one that asks for a worse one.

    Example:
        >>> contrast_reward(torch.tensor([0.0, 1.0, -1e4]))
        tensor([ 0.0000,  0.2311, -0.5000])
    """
    return contrast.sigmoid() - 0.5


def early_stop(
    values: Float[Tensor, "N L"], lengths: Int[Tensor, " N"], *, threshold: float, skip: int = 5
) -> Int[Tensor, " N"]:
    """Where each sequence would have been given up: its first value below the threshold, or its length if none is.

    `lengths - early_stop(...)` tokens would have been saved, the one at which it stops among them. NaN stops nothing.

    Source: arXiv 2407.13887, whose code leaves the first five tokens out; there the values are cosines to a goal state.

    Args:
        values: of each token, right-padded, [N, L].
        lengths: of the sequences, [N].
        threshold: pick it on validation data; it does not carry over between models.
        skip: first tokens that are never the end.

    Example:
        >>> early_stop(torch.tensor([[0.9, 0.3, 0.8]]), torch.tensor([3]), threshold=0.4, skip=0)
        tensor([1])
    """
    place = torch.arange(values.shape[1], device=values.device)
    below = (values < threshold) & (place >= skip) & (place < lengths[:, None])
    return torch.where(below, place, lengths[:, None]).amin(1) if values.shape[1] else lengths

"""Memory for time: activations inside a layer are thrown away and computed again for the gradient."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recompute_activations(model: Any) -> None:
    """Keep only what enters each layer, and compute the layer again in the backward pass.

    transformers' own switch acts only on layers in training mode. Ours stay in evaluation mode, so that no dropout
    moves the importance ratio. Passes without gradient are as before: sampling keeps its cache.

    Raises:
        ValueError: the model has no layers of which transformers says that they can be computed again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"activation_checkpointing needs layers that transformers can compute again, which {type(model).__name__} "
            "lacks. Leave it out, and lower micro_tokens."
        )
    for layer in layers:
        if not isinstance(layer.forward, partial):
            layer.forward = partial(_recomputed, layer.forward)  # a bound method: a copy of the model gets its own


def _recomputed(forward: Any, *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

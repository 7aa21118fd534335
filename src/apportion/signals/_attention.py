"""How attention moves over a response: how far each token looks back, and how much later tokens look back at it.

The maps are never kept. Both statistics are averages over heads, so they are taken of every head by itself, a few
queries at a time while the model runs; which heads count is decided afterwards.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.types import Rollouts, Signal

Maps = Float[Tensor, "B H Q T"]


def waad(attention: Float[Tensor, "*D Q T"], *, window: int = 10, first: int = 0) -> Float[Tensor, "*D Q"]:
    """Windowed average attention distance: how far each query looks back, every distance cut at the window.

    `WAAD_t = sum over s of A_ts min(t - s, window)`.

    Source: arXiv 2510.13554.

    Args:
        attention: rows of causal maps, one per query.
        window: the largest distance that counts.
        first: position of the first query.

    Example:
        >>> waad(torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.5, 0.1, 0.4]]), window=2)
        tensor([0.0000, 0.6000, 1.1000])
    """
    return (attention * _distances(attention, first).clamp(0, window)).sum(-1)


def fai(attention: Float[Tensor, "*D T T"], *, near: int = 10, far: int | None = 50) -> Float[Tensor, "*D T"]:
    """Future attention influence: how much the queries `near` to `far` positions later look at each token, on average.

    `FAI_s = mean over t in [s + near, min(T - 1, s + far)] of A_ts`, 0 where there is no such t.

    Source: arXiv 2510.13554, which in its analysis lets the range run to the end of the response (far=None).

    Args:
        attention: whole causal maps.
        near: distance of the first query that counts.
        far: distance of the last; None for the end.

    Example:
        >>> fai(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.3, 0.6, 0.1]]), near=1, far=2)
        tensor([0.6000, 0.6000, 0.0000])
    """
    looks = _in_range(_distances(attention, 0), near, far)
    return (attention * looks).sum(-2) / looks.sum(-2).clamp(min=1)


def _distances(attention: Float[Tensor, "*D Q T"], first: int) -> Int[Tensor, "Q T"]:
    """t - s of each query t and key s."""
    queries, keys = attention.shape[-2:]
    place = torch.arange(max(first + queries, keys), device=attention.device)
    return place[first : first + queries, None] - place[:keys]


def _in_range(distance: Int[Tensor, "Q T"], near: int, far: int | None) -> Bool[Tensor, "Q T"]:
    return (distance >= near) & (distance <= (distance.shape[-1] if far is None else far))


@dataclass(eq=False)
class AttentionRhythm:
    """Measures the token signals "waad" and "fai": one forward pass up to two thirds of the model's depth.

    Five evenly spaced layers between L/3 and 2L/3 are read. The span of a head is the mean distance that it looks back,
    over all actions of the batch. WAAD is the mean over the heads with the shortest spans, FAI the mean over those with
    the longest. Prompts are looked at, but only actions look: they are the queries of spans, WAAD and FAI, and other
    positions are NaN. Several rows of a trajectory are measured each by itself.

    Source: arXiv 2510.13554. Readings of ours: heads of all five layers are ranked together; `round(share x heads)` of
        them, at least one, with ties to the lower layer and head; the depth in layers is rounded; a layer of another
        kind (a recurrent one) is passed over.
    Reads: tokens, action_mask. Scope: batch, through the spans of the heads. Unit: token.
    Cost: a forward pass without the last third of the layers; memory of `queries` rows of one layer's maps at a time,
        and two numbers per action and head. Prompts are not shared between rows.
    Degenerate: an empty response has nothing; a token without queries in the range of FAI has 0.

    Args:
        model: a causal language model of transformers; None for the one that the trainer attaches: the acting policy.
        window: of `waad`. near, far: of `fai`.
        layers: how many.
        share: of the heads, both for the shortest and for the longest spans.
        heads: the two sets are chosen anew on each "batch", or kept as they were on the "first".
        micro_tokens: positions in one forward pass. queries: rows of the maps that exist at one time.

    Raises:
        ValueError: a setting out of bounds; a model whose attention cannot be looked into; no model.
    """

    model: Any = field(default=None, repr=False)
    window: int = 10
    near: int = 10
    far: int | None = 50
    layers: int = 5
    share: float = 0.3
    heads: Literal["batch", "first"] = "batch"
    micro_tokens: int = 4096
    queries: int = 128

    provides = ("signals.waad", "signals.fai")
    requires = ("tokens",)

    def __post_init__(self) -> None:
        bounds = {
            "window": self.window >= 1,
            "near": self.near >= 1,
            "far": self.far is None or self.far >= self.near,
            "layers": self.layers >= 1,
            "share": 0 < self.share <= 1,
            "heads": self.heads in ("batch", "first"),
            "micro_tokens": self.micro_tokens >= 1,
            "queries": self.queries >= 1,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, right in bounds.items() if not right]
        if wrong:
            raise ValueError(
                f"AttentionRhythm got {', '.join(wrong)}. Numbers must be at least 1, far at least near, 0 < share <= 1, "
                "and heads 'batch' or 'first'."
            )
        self._model = self.model
        self._chosen: tuple[Tensor, Tensor] | None = None

    def attach(self, policy: Any) -> None:
        """Look into the acting policy, where no model was given."""
        self._model = policy.acting_model if self.model is None else self.model

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"waad": [B, T], "fai": [B, T]}`, NaN where there is no action."""
        if self._model is None:
            raise ValueError("AttentionRhythm needs a model. Give it one, or let the trainer attach the acting policy.")
        values = torch.full((2, *rollouts.action_mask.shape), torch.nan, device=rollouts.device)
        seen = [(rows, self._look(rollouts, rows)) for rows in _by_length(rollouts, self.micro_tokens)]
        if seen:
            near, far = self._head_sets(torch.stack([look.span for _, look in seen]).sum(0))
            for rows, look in seen:
                row, place = rollouts.action_mask[rows].nonzero(as_tuple=True)
                values[:, rows[row], place] = torch.stack([look.waad[near].mean(0), look.fai[far].mean(0)])
        return {"waad": Signal(values[0], "token"), "fai": Signal(values[1], "token")}

    def state_dict(self) -> dict[str, Any]:
        """The heads that were chosen first."""
        return {"heads": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these heads."""
        self._chosen = state["heads"]

    def _head_sets(self, spans: Float[Tensor, " H"]) -> tuple[Tensor, Tensor]:
        """The heads with the shortest and with the longest spans."""
        if self._chosen is None or self.heads == "batch":
            size = max(1, round(self.share * len(spans)))
            self._chosen = (spans.argsort(stable=True)[:size], spans.argsort(stable=True, descending=True)[:size])
        return self._chosen

    @torch.no_grad()
    def _look(self, rollouts: Rollouts, rows: Int[Tensor, " R"]) -> "_Look":
        assert rollouts.tokens is not None
        plain = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        depth = plain.config.get_text_config().num_hidden_layers
        layers = sorted(
            {min(depth - 1, round(depth * (1 + i / max(1, self.layers - 1)) / 3)) for i in range(self.layers)}
        )
        width = int(rollouts.lengths[rows].max())
        acts = rollouts.action_mask[rows, :width]
        found = {layer: _Heads(acts, self.window, self.near, self.far) for layer in layers}
        present = torch.arange(width, device=acts.device) < rollouts.lengths[rows, None]
        with _watched(plain, layers, self.queries, lambda layer, first, maps: found[layer].see(first, maps)):
            plain.base_model(
                input_ids=rollouts.tokens[rows, :width], attention_mask=present.to(torch.int64), use_cache=False
            )
        looks = [heads.result() for heads in found.values() if heads.influence is not None]
        if not looks:
            raise ValueError(f"none of the layers {layers} of this model has attention. Choose another method.")
        return _Look(*(torch.cat(columns) for columns in zip(*looks, strict=True)))


@dataclass(frozen=True)
class _Look:
    """Of each head, over some rows: the sum of its distances, [H], and at each action WAAD and FAI, [H, M]."""

    span: Float[Tensor, " H"]
    waad: Float[Tensor, "H M"]
    fai: Float[Tensor, "H M"]


class _Heads:
    """What one layer's heads look at, added up while it passes by."""

    def __init__(self, acts: Bool[Tensor, "B T"], window: int, near: int, far: int | None):
        self.acts, self.window, self.near, self.far = acts, window, near, far
        self.spans: list[Tensor] = []
        self.distances: list[Tensor] = []
        self.influence: Tensor | None = None
        self.looks = torch.zeros(acts.shape, device=acts.device)

    def see(self, first: int, maps: Maps) -> None:
        """Some queries, of which the first has this position."""
        maps = maps.float()
        distance = _distances(maps, first)
        weights = torch.stack([distance, distance.clamp(max=self.window)]).clamp(min=0).float()
        spans, distances = torch.einsum("bhqt,wqt->wbhq", maps, weights)
        self.spans.append(spans)
        self.distances.append(distances)
        acts = self.acts[:, first : first + maps.shape[2]]
        keys = slice(0 if self.far is None else max(0, first - self.far), max(0, first + maps.shape[2] - self.near))
        looks = _in_range(distance, self.near, self.far)[:, keys] & acts[:, :, None]
        if self.influence is None:
            self.influence = maps.new_zeros(maps[:, :, 0].shape)
        self.influence[:, :, keys] += (maps[..., keys] * looks[:, None]).sum(2)
        self.looks[:, keys] += looks.sum(1)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Span, WAAD and FAI of each head."""
        assert self.influence is not None
        fai = self.influence / self.looks.clamp(min=1)[:, None]
        spans, distances, fai = (
            x.transpose(0, 1)[:, self.acts] for x in (torch.cat(self.spans, 2), torch.cat(self.distances, 2), fai)
        )
        return spans.sum(1), distances, fai


def _by_length(rollouts: Rollouts, limit: int) -> Iterator[Int[Tensor, " R"]]:
    """Rows with actions, of similar length, at most `limit` positions together."""
    order = rollouts.lengths.argsort(stable=True, descending=True)
    order = order[rollouts.action_mask.any(1)[order]]
    while len(order):
        count = max(1, limit // int(rollouts.lengths[order[0]]))
        yield order[:count]
        order = order[count:]


# ---- looking into a model ----------------------------------------------------------------------------------------------

_NAME = "apportion_watched"


class _Seen(Exception):
    """The last layer of interest has been seen; the rest of the model need not run."""


@contextmanager
def _watched(model: Any, layers: list[int], queries: int, see: Callable[[int, int, Maps], None]) -> Iterator[None]:
    """Inside, `see(layer, first query, maps)` is shown what these layers attend to; afterwards all is as before.

    A watched layer computes its attention with the model's own plain function, a few queries at a time. The forward
    pass ends with the last of them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask

    before = model.config._attn_implementation

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        if module.layer_idx not in layers:
            plain = eager if before == "eager" else sdpa_attention_forward
            return plain(module, query, key, value, attention_mask, **settings)
        out = []
        for first in range(0, query.shape[2], queries):
            part = slice(first, first + queries)
            mixed, maps = eager(module, query[:, :, part], key, value, attention_mask[:, :, part], **settings)
            see(module.layer_idx, first, maps)
            out.append(mixed)
        if module.layer_idx == layers[-1]:
            raise _Seen
        return torch.cat(out, 1), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)
    try:
        if model.config._attn_implementation != _NAME:
            raise ValueError(
                f"the attention of {type(model).__name__} cannot be looked into: it does not go through the attention "
                "interface of transformers. Choose another model, or another method."
            )
        with suppress(_Seen):
            yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(_NAME, sdpa_attention_forward)  # let go of what `see` holds

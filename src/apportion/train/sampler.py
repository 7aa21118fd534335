"""Sampling from a causal language model: prompts computed once, finished rows dropped, log-probabilities kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion.signals import token_statistics


@dataclass(frozen=True)
class Sampled:
    """One continuation: `tokens` (the end token included), `logprobs` as sampled (nats), `truncated` by the limit.

    `statistics` are those asked for, by name, with one number per token.
    """

    tokens: list[int]
    logprobs: list[float]
    truncated: bool
    statistics: dict[str, list[float]] = field(default_factory=dict)


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    group_sizes: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    statistics: Sequence[str] = (),
    batch_rows: int = 64,
    on_rows: Callable[[int], None] | None = None,
) -> list[list[Sampled]]:
    """Sample `group_sizes[i]` continuations of `prompts[i]` from softmax(logits / temperature); 0 = greedy.

    Each prompt goes through the model once, whatever its group size. Every row has its own stream of uniform numbers,
    drawn before sampling starts, so a row's randomness does not depend on when its neighbours finish.
    Greedy rows report the log-probability at temperature 1.

    Args:
        statistics: names of `signals.TOKEN_STATISTICS` to read off the logits that each token was drawn from.
        batch_rows: rows decoded together; whole prompts are packed up to it (a larger group is decoded alone).
        on_rows: called with the number of rows that have just finished, for progress bars.
    """
    out: list[list[Sampled]] = []
    limit = max(1, max_new_tokens)
    for first, last in _batches(group_sizes, batch_rows):
        sizes = list(group_sizes[first:last])
        uniform = torch.rand(sum(sizes), limit, generator=generator)
        rows = _decode(model, prompts[first:last], sizes, uniform, set(end_ids), pad_id, temperature, statistics)
        start = 0
        for size in sizes:
            out.append(rows[start : start + size])
            start += size
        if on_rows:
            on_rows(len(rows))
    return out


def _batches(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Consecutive prompts packed so that their rows fit into `limit`."""
    cuts, rows = [0], 0
    for i, size in enumerate(sizes):
        if rows and rows + size > limit:
            cuts.append(i)
            rows = 0
        rows += size
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True)) if sizes else []


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sizes: list[int],
    uniform: Tensor,
    end_ids: set[int],
    pad_id: int,
    temperature: float,
    statistics: Sequence[str],
) -> list[Sampled]:
    device = model.device
    rows, limit = uniform.shape
    logits, cache, mask = _prefill(model, prompts, pad_id)
    repeats = torch.tensor(sizes, device=device)
    cache.batch_select_indices(torch.repeat_interleave(torch.arange(len(sizes), device=device), repeats))
    logits, mask = logits.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
    uniform = uniform.to(device)
    ends = torch.tensor(sorted(end_ids), device=device)

    tokens = torch.full((rows, limit), pad_id, dtype=torch.int64, device=device)
    logprobs = torch.zeros(rows, limit, device=device)
    read = torch.zeros(len(statistics), rows, limit, device=device)
    lengths = torch.full((rows,), limit, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    active = torch.arange(rows, device=device)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    for t in range(limit):
        chosen, logp = _choose(logits, uniform[active, t], temperature)
        tokens[active, t] = torch.where(alive, chosen, tokens[active, t])
        logprobs[active, t] = torch.where(alive, logp, logprobs[active, t])
        if statistics:
            found = token_statistics(logits.float(), chosen, names=statistics, temperature=temperature)
            read[:, active, t] = torch.stack(list(found.values()))
        stops = alive & torch.isin(chosen, ends)
        lengths[active[stops]] = t + 1
        ended[active[stops]] = True
        alive = alive & ~stops
        if t + 1 == limit or not bool(alive.any()):
            break
        if int(alive.sum()) <= 0.9 * len(alive):
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            active, chosen, mask, alive = active[keep], chosen[keep], mask[keep], alive[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = (mask.sum(1, keepdim=True) - 1).to(torch.int64)
        step = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        logits, cache = step.logits[:, -1], step.past_key_values
    columns = (tokens, logprobs, read.transpose(0, 1), lengths, ended)
    return [
        Sampled(x[:n], lp[:n], not e, {name: value[:n] for name, value in zip(statistics, values, strict=True)})
        for x, lp, values, n, e in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _prefill(model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Any, Tensor]:
    """Left-padded prompts through the model once: logits of the last position, cache, attention mask."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values, mask


def _choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF (one uniform number each), or the largest; with its log-probability."""
    logits = logits.float()
    if temperature == 0:
        chosen = logits.argmax(1)
    else:
        logits = logits / temperature
        cdf = torch.softmax(logits, 1).cumsum_(1)
        chosen = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
            max=logits.shape[1] - 1
        )
    logp = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)
    return chosen, logp

"""Sampling from a causal language model: prompts computed once, finished rows dropped, log-probabilities kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.signals import token_statistics

NUCLEUS_GUESSES = (64, 1024, 8192)
"""How many of the likeliest tokens are looked at for the nucleus before all are sorted."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn: from softmax(logits / temperature), cut to `top_k`, and what is left cut to `top_p`.

    `top_k`, `top_p` and `min_new_tokens` change what is drawn, never what is recorded: the log-probabilities of a
    rollout are those of the full distribution at the temperature, as the learner computes them. So the importance ratio
    starts at 1, and an update does not follow exactly the distribution that acted; near the defaults it is close.

    Args:
        max_new_tokens: limit of a response.
        min_new_tokens: a token ends the response only if so many stand before it: end tokens are not drawn, and texts
            of `stop` do not count.
        temperature: 0 is greedy; log-probabilities are then those at temperature 1.
        top_p: the likeliest tokens whose probabilities first add up to this, renormalised; 1 = all.
        top_k: so many likeliest tokens, renormalised; 0 = all.
        stop: texts that end a response. They may begin and end inside tokens; the response ends with the token that
            completes one and keeps it. That is an end, no truncation. Special tokens count as their literal text.

    Raises:
        ValueError: a setting is out of its range, or an empty text in `stop`.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "lie in 0..max_new_tokens"),
            "temperature": (self.temperature >= 0, "be at least 0"),
            "top_p": (0 < self.top_p <= 1, "lie above 0 and not above 1"),
            "top_k": (self.top_k >= 0, "be at least 0"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "hold texts, none of them empty"),
        }
        for name, (good, want) in ranges.items():
            if not good:
                raise ValueError(f"{name} must {want}; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Sampled:
    """One continuation: `tokens` (the end token included), `logprobs` as sampled (nats), `truncated` by the limit.

    `statistics` are those asked for, by name, with one number per token.
    """

    tokens: list[int]
    logprobs: list[float]
    truncated: bool
    statistics: dict[str, list[float]] = field(default_factory=dict)


def uniform_numbers(rows: int, sampling: Sampling, generator: torch.Generator | None) -> Float[Tensor, "R L"]:
    """A stream of uniform numbers for every row, long enough for its response."""
    return torch.rand(rows, sampling.max_new_tokens, generator=generator)


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    group_sizes: Sequence[int],
    sampling: Sampling,
    uniform: Float[Tensor, "R L"],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    statistics: Sequence[str] = (),
    batch_rows: int = 64,
    decode: Decode | None = None,
    limits: Sequence[int] | None = None,
) -> Iterator[list[Sampled]]:
    """`group_sizes[i]` continuations of `prompts[i]`, prompt after prompt; each batch is computed when it is asked for.

    Each prompt goes through the model once, whatever its group size. Every row has its own stream of uniform numbers,
    so a row's randomness does not depend on when its neighbours finish.

    Args:
        uniform: those streams, one row per continuation (`uniform_numbers`).
        statistics: names of `signals.TOKEN_STATISTICS` to read off the logits before anything was cut from them.
        batch_rows: rows decoded together; whole prompts are packed up to it (a larger group is decoded alone).
        decode: the text of token ids; needed for `sampling.stop`.
        limits: for each prompt, a limit below `max_new_tokens`; None = there is none.

    Raises:
        ValueError: texts to stop at, but no `decode`.
    """
    if sampling.stop and decode is None:
        raise ValueError(f"stop={sampling.stop!r} needs decode, the text of token ids.")
    row = 0
    for first, last in _batches(group_sizes, batch_rows):
        sizes = list(group_sizes[first:last])
        part = uniform[row : row + sum(sizes)]
        ends = limits and [n for n, size in zip(limits[first:last], sizes, strict=True) for _ in range(size)]
        stops = _Stops(sampling.stop, decode, len(part)) if sampling.stop and decode else None
        rows = _decode(model, prompts[first:last], sizes, part, sampling, set(end_ids), pad_id, statistics, stops, ends)
        row += len(part)
        for size in sizes:
            yield rows[:size]
            rows = rows[size:]


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
    sampling: Sampling,
    end_ids: set[int],
    pad_id: int,
    statistics: Sequence[str],
    stops: "_Stops | None",
    limits: Sequence[int] | None,
) -> list[Sampled]:
    device = model.device
    rows, limit = uniform.shape
    logits, cache, mask = _prefill(model, prompts, pad_id)
    repeats = torch.tensor(sizes, device=device)
    cache.batch_select_indices(torch.repeat_interleave(torch.arange(len(sizes), device=device), repeats))
    logits, mask = logits.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
    uniform = uniform.to(device)
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
    last = None if limits is None else torch.tensor(limits, device=device)

    tokens = torch.full((rows, limit), pad_id, dtype=torch.int64, device=device)
    logprobs = torch.zeros(rows, limit, device=device)
    read = torch.zeros(len(statistics), rows, limit, device=device)
    lengths = torch.full((rows,), limit, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    active = torch.arange(rows, device=device)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    for t in range(limit):
        may_end = t >= sampling.min_new_tokens
        chosen, logp = _choose(logits, uniform[active, t], sampling, barred=None if may_end else ends)
        tokens[active, t] = torch.where(alive, chosen, tokens[active, t])
        logprobs[active, t] = torch.where(alive, logp, logprobs[active, t])
        if statistics:
            found = token_statistics(logits.float(), chosen, names=statistics, temperature=sampling.temperature)
            read[:, active, t] = torch.stack(list(found.values()))
        over = alive & torch.isin(chosen, ends)
        if stops is not None:
            said = stops.completed(active.tolist(), chosen.tolist())
            over |= alive & torch.tensor(said, device=device) & may_end
        ended[active[over]] = True
        if last is not None:
            over |= alive & (last[active] == t + 1)
        lengths[active[over]] = t + 1
        alive = alive & ~over
        if t + 1 == limit or not bool(alive.any()):
            break
        if int(alive.sum()) <= (0.9 if last is None else 1.0) * len(alive):  # none may go on beyond a limit
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


# ---- one token --------------------------------------------------------------------------------------------------------


def _choose(
    logits: Tensor, uniform: Tensor, sampling: Sampling, barred: Int[Tensor, " E"] | None = None
) -> tuple[Tensor, Tensor]:
    """One token per row, none of the `barred`, with its log-probability in the full distribution."""
    logits = logits.float()
    if sampling.temperature:
        logits = logits / sampling.temperature
    allowed = logits if barred is None else logits.index_fill(1, barred, -torch.inf)
    if not sampling.temperature:
        chosen = allowed.argmax(1)
    elif sampling.top_k or sampling.top_p < 1:
        kept, ids = _likeliest(torch.softmax(allowed, 1), sampling.top_k, sampling.top_p)
        chosen = ids.gather(1, _inverse(kept.cumsum(1), uniform)[:, None])[:, 0]
    else:
        chosen = _inverse(torch.softmax(allowed, 1).cumsum_(1), uniform)
    logp = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)
    return chosen, logp


def _inverse(cdf: Float[Tensor, "R K"], uniform: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Where a uniform number times the whole first lies below the running sum: never at a probability of 0."""
    whole = cdf[:, -1]
    below = torch.minimum(uniform * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(cdf, below[:, None], right=True)[:, 0]


def _likeliest(p: Float[Tensor, "R V"], top_k: int, top_p: float) -> tuple[Float[Tensor, "R K"], Int[Tensor, "R K"]]:
    """The probabilities that are kept, largest first, 0 for the rest; and whose they are.

    `top_k` is applied first; `top_p` then counts in what is left of the probability, as in transformers and vLLM.
    """
    size = p.shape[1]
    for k in (top_k,) if top_k else (*NUCLEUS_GUESSES, size):
        kept, ids = p.topk(min(k, size), 1)
        whole = kept.sum(1, keepdim=True) if top_k else p.sum(1, keepdim=True)
        full = kept.cumsum(1) >= top_p * whole
        if top_k or k >= size or bool(full[:, -1].all()):
            break
    kept[:, 1:].masked_fill_(full[:, :-1], 0.0)
    return kept, ids


# ---- texts that end a response ----------------------------------------------------------------------------------------


class _Stops:
    """Knows what every row wrote, and whether its newest token completed one of the texts."""

    def __init__(self, texts: Sequence[str], decode: Decode, rows: int):
        self.texts, self.decode = texts, decode
        self.window = 1 + max(len(text.encode()) for text in texts)  # tokens that can hold a text, and one before it
        self.written: list[list[int]] = [[] for _ in range(rows)]

    def completed(self, rows: Sequence[int], chosen: Sequence[int]) -> list[bool]:
        """Whether this token completes a text in each of these rows."""
        for row, token in zip(rows, chosen, strict=True):
            self.written[row].append(token)
        return [self._completed(self.written[row][-self.window :]) for row in rows]

    def _completed(self, ids: list[int]) -> bool:
        text = self.decode(ids)
        found = [stop for stop in self.texts if stop in text]
        if not found:
            return False
        before = len(self.decode(ids[:-1]).rstrip("\ufffd"))  # what ended there was completed earlier
        return any(text.rfind(stop) + len(stop) > before for stop in found)

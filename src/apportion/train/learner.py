"""The updates of a step: inner epochs of mini-batches, each one optimizer step over micro-batches of the rows that teach."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.losses import LossSum, Totals, totals_of
from apportion.train.policy import Policy
from apportion.types import Credit, Rollouts


class NotFinite(ValueError):
    """A loss, reward or gradient is NaN or infinite. `rows` are the rollouts that caused it, of `rollouts` if given.

    `updates` says how many updates of the step had been made before.
    """

    def __init__(self, what: str, rows: Sequence[int], rollouts: Rollouts | None = None, updates: int = 0):
        super().__init__(what)
        self.rows, self.rollouts, self.updates = list(rows), rollouts, updates


def learn(
    policy: Policy,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    credit: Credit,
    loss: LossSum,
    *,
    epochs: int = 1,
    parts: int = 1,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> dict[str, float]:
    """`epochs` passes over the rollouts, each cut into `parts` mini-batches of whole groups, one `update` for each.

    The credit stays that of the whole step. Returns the means of the metrics over the updates.

    Raises:
        NotFinite: as `update`, with the rows of the whole step.
    """
    every: list[dict[str, float]] = []
    for rows in mini_batches(rollouts, epochs, parts, generator):
        part, its = (rollouts.select(rows, covers="group"), credit.select(rows)) if parts > 1 else (rollouts, credit)
        try:
            every.append(update(policy, parameters, optimizer, part, its, loss, **settings))
        except NotFinite as error:
            raise NotFinite(str(error), [int(rows[i]) for i in error.rows], updates=len(every)) from error
    names = dict.fromkeys(name for metrics in every for name in metrics)
    return {name: sum(m.get(name, 0.0) for m in every) / len(every) for name in names}


def mini_batches(
    rollouts: Rollouts, epochs: int, parts: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """The rows of each mini-batch: the groups of each epoch, shuffled if they are cut, in `parts` of nearly equal number.

    Fewer groups than parts are one a part.
    """
    for _ in range(epochs):
        order = torch.arange(rollouts.num_groups)
        if parts > 1:
            order = order[torch.randperm(rollouts.num_groups, generator=generator)]
        for groups in order.tensor_split(min(parts, len(order))):
            yield torch.isin(rollouts.group_ids, groups.to(rollouts.device)).nonzero()[:, 0]


def update(
    policy: Policy,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    credit: Credit,
    loss: LossSum,
    *,
    micro_tokens: int,
    grad_clip: float,
    skip_flat: bool = True,
) -> dict[str, float]:
    """Gradient of the whole step's loss, clipped, then one optimizer step. Returns the metrics.

    Rows on which every term is flat are left out (with `skip_flat`): their gradient is exactly zero, and `totals` count
    them all the same, so nothing but the time changes.

    Raises:
        NotFinite: before the weights are touched, with the rows that caused it.
    """
    totals = totals_of(rollouts, credit)
    live = ~loss.flat_rows(rollouts, credit) if skip_flat else rollouts.lengths > 0
    optimizer.zero_grad()
    metrics: dict[str, float] = {}
    limit = micro_tokens if loss.scope == "row" else sys.maxsize  # a loss that compares rows gets the step in one pass
    for rows in micro_batches(rollouts, live.nonzero()[:, 0], limit):
        part = _backward(policy, rollouts, credit, loss, totals, rows)
        metrics = {k: metrics.get(k, 0.0) + v for k, v in part.items()}
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a flat step still moves AdamW's averages
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, grad_clip, foreach=True))
    if not _finite(norm, metrics.get("loss", 0.0)):
        guilty = _guilty(policy, parameters, rollouts, credit, loss, totals, live.nonzero()[:, 0])
        raise NotFinite(f"the loss is {metrics.get('loss')} and its gradient norm {norm}", guilty)
    optimizer.step()
    optimizer.zero_grad()  # not to be held while sampling
    return {"loss": 0.0, **metrics, "grad_norm": norm, "live_rows": float(live.float().mean())}


def micro_batches(rollouts: Rollouts, rows: Tensor, limit: int) -> Iterator[Tensor]:
    """Cut `rows` into runs of at most `limit` padded tokens; rows of a group stay neighbours, so prompts are shared."""
    order = rows[torch.argsort(rollouts.group_ids[rows], stable=True)]
    lengths = rollouts.lengths.tolist()
    batch: list[int] = []
    widest = 0
    for row in order.tolist():
        wider = max(widest, lengths[row])
        if batch and wider * (len(batch) + 1) > limit:
            yield torch.tensor(batch, device=rows.device)
            batch, wider = [], lengths[row]
        batch.append(row)
        widest = wider
    if batch:
        yield torch.tensor(batch, device=rows.device)


@torch.no_grad()
def in_parts(rollouts: Rollouts, limit: int, read: Callable[[Rollouts], Tensor]) -> Tensor:
    """What `read` makes of the rows, [B, ...], in passes of at most `limit` padded tokens, without gradient."""
    parts = [
        (rows, read(rollouts.select(rows)))
        for rows in micro_batches(rollouts, torch.arange(rollouts.batch, device=rollouts.device), limit)
    ]
    order = torch.cat([rows for rows, _ in parts])
    return torch.cat([part for _, part in parts])[order.argsort()]


def _backward(
    policy: Policy, rollouts: Rollouts, credit: Credit, loss: LossSum, totals: Totals, rows: Tensor
) -> dict[str, float]:
    part, part_credit = rollouts.select(rows), credit.select(rows)
    outputs = policy.outputs(part, part_credit.mask, loss.needs)
    value, metrics = loss(outputs, part, part_credit, totals.take(rows))
    value.backward()  # type: ignore[no-untyped-call]
    return dict(metrics)


def _finite(*numbers: float) -> bool:
    return all(x - x == 0 for x in numbers)


def _guilty(
    policy: Policy,
    parameters: Sequence[torch.nn.Parameter],
    rollouts: Rollouts,
    credit: Credit,
    loss: LossSum,
    totals: Totals,
    rows: Tensor,
) -> list[int]:
    """The rows whose own gradient is not finite; every row if only their sum overflows."""
    guilty = []
    for row in rows.tolist():
        for p in parameters:
            p.grad = None
        metrics = _backward(policy, rollouts, credit, loss, totals, torch.tensor([row], device=rows.device))
        grads: list[Any] = [p.grad for p in parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if not _finite(norm, metrics["loss"]):
            guilty.append(row)
    return guilty or rows.tolist()

"""Several batches of rollouts as one: the rounds of sampling of a step."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.types import Rollouts, Signal, Spans


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """The rows of all parts, one after the other; their groups and trajectories stay apart.

    Where only some parts know the states of spans, those of the others match nothing.

    Raises:
        ValueError: a field, signal or span set that some parts have and others lack; a signal of unit "batch".
    """
    if len(parts) == 1:
        return parts[0]
    first, width = parts[0], max(p.width for p in parts)
    groups = _offsets([p.num_groups for p in parts])
    trajectories = _offsets([p.num_trajectories for p in parts])
    columns: dict[str, Any] = {}
    for f in fields(first):
        values = [getattr(p, f.name) for p in parts]
        if isinstance(values[0], Tensor):
            columns[f.name] = _stacked(f.name, values, width)
        elif any(isinstance(v, Tensor) for v in values):
            raise ValueError(f"some batches have {f.name} and others lack it. Measure all of them, or none.")
    columns["group_ids"] = torch.cat([p.group_ids + o for p, o in zip(parts, groups, strict=True)])
    columns["trajectory_ids"] = torch.cat([p.trajectory_ids + o for p, o in zip(parts, trajectories, strict=True)])
    for name in ("spans", "signals", "meta"):
        if any(getattr(p, name).keys() != getattr(first, name).keys() for p in parts):
            raise ValueError(f"the {name} of the batches differ: {[sorted(getattr(p, name)) for p in parts]}.")
    return Rollouts(
        **columns,
        covers=first.covers,
        spans={name: _spans([p.spans[name] for p in parts], [p.batch for p in parts]) for name in first.spans},
        signals={name: _signal(name, [p.signals[name] for p in parts], width) for name in first.signals},
        meta={name: [x for p in parts for x in p.meta[name]] for name in first.meta},
    )


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _stacked(name: str, values: Sequence[Tensor | None], width: int) -> Tensor:
    present = [v for v in values if v is not None]
    if len(present) < len(values):
        raise ValueError(f"some batches have {name} and others lack it. Measure all of them, or none.")
    return torch.cat([_widened(v, width, 0) if v.dim() > 1 else v for v in present])


def _widened(x: Tensor, width: int, fill: float) -> Tensor:
    """The second axis padded at its end."""
    return pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]), value=fill)


def _spans(parts: Sequence[Spans], rows: Sequence[int]) -> Spans:
    columns: dict[str, Any] = {}
    for f in fields(parts[0]):
        values = [getattr(s, f.name) for s in parts]
        if f.name == "state" and any(v is not None for v in values):  # unknown ones match nothing
            values = [torch.arange(len(s), device=s.row.device) if s.state is None else s.state for s in parts]
        shift = {"row": _offsets(rows), "parent": _offsets([len(s) for s in parts])}.get(f.name, [0] * len(parts))
        present = [
            torch.where(v >= 0, v + o, v) if f.name == "parent" else v + o
            for v, o in zip(values, shift, strict=True)
            if v is not None
        ]
        if present and len(present) < len(parts):
            raise ValueError(f"some span sets have {f.name!r} and others lack it. Measure all of them, or none.")
        columns[f.name] = torch.cat(present) if present else None
    return Spans(**columns)


def _signal(name: str, parts: Sequence[Signal], width: int) -> Signal:
    unit = parts[0].unit
    if unit == "batch" or any(s.unit != unit for s in parts):
        raise ValueError(f"signal {name!r} has the units {[s.unit for s in parts]}, which cannot be joined.")
    values = [_widened(s.values, width, torch.nan) if unit == "token" else s.values for s in parts]
    return Signal(torch.cat(values), unit, parts[0].axes)

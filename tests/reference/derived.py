"""Batches made from others that must get the same credit: rows joined, a trajectory repeated, one left unmeasured."""

from dataclasses import fields, replace

import torch

from apportion import Rollouts, Signal, Spans

AT_POSITIONS = ("tokens", "action_mask", "logprobs", "old_logprobs", "ref_logprobs", "values")
PER_ROW = ("lengths", "group_ids", "trajectory_ids", "row_index", "truncated", "bootstrap")


def joined(r: Rollouts) -> tuple[Rollouts, torch.Tensor, torch.Tensor]:
    """The rows of each trajectory as one row; and where each position went, as rows [B, T] and places [B, T]."""
    n = r.num_trajectories
    before = torch.zeros(r.batch, dtype=torch.int64)
    for b in range(r.batch):
        same = (r.trajectory_ids == r.trajectory_ids[b]) & (r.row_index < r.row_index[b])
        before[b] = r.lengths[same].sum()
    total = torch.zeros(n, dtype=torch.int64).index_add_(0, r.trajectory_ids, r.lengths)
    width = int(total.max()) if n else 0
    inside = torch.arange(r.width) < r.lengths[:, None]
    row = r.trajectory_ids[:, None].expand(r.batch, r.width)
    place = before[:, None] + torch.arange(r.width)

    def laid(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(n, width, dtype=x.dtype)
        out[row[inside], place[inside]] = x[inside]
        return out

    last = torch.zeros(n, dtype=torch.int64)
    for b in range(r.batch):
        if int(r.row_index[b]) == int(r.row_index[r.trajectory_ids == r.trajectory_ids[b]].max()):
            last[r.trajectory_ids[b]] = b
    spans = {
        k: replace(s, row=r.trajectory_ids[s.row], start=s.start + before[s.row], stop=s.stop + before[s.row])
        for k, s in r.spans.items()
    }
    signals = {k: replace(v, values=laid(v.values)) if v.unit == "token" else v for k, v in r.signals.items()}
    one = Rollouts(
        **{k: laid(getattr(r, k)) for k in AT_POSITIONS},
        lengths=total,
        group_ids=r.trajectory_groups,
        trajectory_ids=torch.arange(n),
        row_index=torch.zeros(n, dtype=torch.int64),
        truncated=r.truncated[last],
        bootstrap=r.bootstrap[last],
        spans=spans,
        signals=signals,
    )
    return one, row, torch.where(inside, place, 0)


def with_twin(r: Rollouts, trajectory: int) -> tuple[Rollouts, torch.Tensor]:
    """The batch with one trajectory sampled and measured twice, in its own group; and the rows of the original."""
    rows = (r.trajectory_ids == trajectory).nonzero()[:, 0]
    columns = {k: torch.cat([getattr(r, k), getattr(r, k)[rows]]) for k in (*AT_POSITIONS, *PER_ROW)}
    columns["trajectory_ids"][r.batch :] = r.num_trajectories
    spans, which = {}, {}
    for name, s in r.spans.items():
        mine = (r.trajectory_ids[s.row] == trajectory).nonzero()[:, 0]
        which[name] = mine
        spans[name] = _spans_twice(s, mine, rows, r.batch)
    again = {"trajectory": torch.tensor([trajectory]), "token": rows, **which}
    signals = {
        k: replace(v, values=torch.cat([v.values, v.values[again[v.unit]]])) if v.unit in again else v
        for k, v in r.signals.items()
    }
    return Rollouts(**columns, spans=spans, signals=signals), rows


def _spans_twice(s: Spans, mine: torch.Tensor, rows: torch.Tensor, batch: int) -> Spans:
    columns = {f.name: getattr(s, f.name) for f in fields(s)}
    twice = {k: None if v is None else torch.cat([v, v[mine]]) for k, v in columns.items()}
    new_row = {int(b): batch + i for i, b in enumerate(rows)}
    twice["row"][len(s) :] = torch.tensor([new_row[int(b)] for b in s.row[mine]], dtype=torch.int64)
    if twice["parent"] is not None:
        new = {int(k): len(s) + i for i, k in enumerate(mine)}
        parents = [new.get(int(p), int(p)) for p in s.parent[mine]]
        twice["parent"][len(s) :] = torch.tensor(parents, dtype=torch.int64)
    return Spans(**twice)


def without_measurements_of(r: Rollouts, trajectory: int) -> Rollouts:
    """Everything that was measured of one trajectory becomes NaN."""
    hit = {"trajectory": torch.arange(r.num_trajectories) == trajectory}
    hit["token"] = (r.trajectory_ids == trajectory)[:, None].expand(r.batch, r.width)
    for name, s in r.spans.items():
        hit[name] = r.trajectory_ids[s.row] == trajectory

    def blank(v: Signal) -> Signal:
        if v.unit not in hit:
            return v
        where = hit[v.unit].view(*hit[v.unit].shape, *[1] * (v.values.dim() - hit[v.unit].dim()))
        return replace(v, values=torch.where(where, torch.nan, v.values))

    return r.replace(signals={k: blank(v) for k, v in r.signals.items()})

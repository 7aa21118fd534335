"""What happened (`Rollouts`), what was measured (`Signal` over `Spans`) and who gets the credit (`Credit`).

Frozen dataclasses and their validation; no mathematics. Letters, the same everywhere: `B` rows, `T` positions,
`S` spans, `N` trajectories, `G` groups, `D` extra axes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Cover = Literal["row", "group", "batch"]
_UNITS = ("batch", "group", "trajectory", "token")


@dataclass(frozen=True)
class Spans:
    """Stretches of rows: steps, turns, macro actions. Half-open, `[start, stop)`; empty is legal.

    Spans of one name do not overlap and need not tile a row.

    Args:
        row: the row each span lies in, [S].
        start: first position, [S].
        stop: position after the last, [S].
        index: ordinal of the span in its trajectory (0, 1, ...), [S].
        state: equal within a group means "same situation before the span", [S]; None = unknown.
        parent: index of the parent span in the same set, -1 = root, [S]; None = flat.
    """

    row: Int[Tensor, " S"]
    start: Int[Tensor, " S"]
    stop: Int[Tensor, " S"]
    index: Int[Tensor, " S"]
    state: Int[Tensor, " S"] | None = None
    parent: Int[Tensor, " S"] | None = None

    def __len__(self) -> int:
        return self.row.shape[0]

    @classmethod
    def from_lists(cls, spans: Sequence[Sequence[tuple[int, int]]]) -> "Spans":
        """One list of `(start, stop)` pairs per row; the ordinal counts within the row.

        >>> Spans.from_lists([[(0, 2), (2, 4)], [(0, 1)]]).row
        tensor([0, 0, 1])
        """
        flat = [(b, s, e, i) for b, row in enumerate(spans) for i, (s, e) in enumerate(row)]
        columns = torch.tensor(flat, dtype=torch.int64).reshape(-1, 4).unbind(1)
        return cls(*columns)

    def to_lists(self, rows: int) -> list[list[tuple[int, int]]]:
        """The inverse of `from_lists`, for people and judges."""
        out: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        for b, s, e in zip(self.row.tolist(), self.start.tolist(), self.stop.tolist(), strict=True):
            out[b].append((s, e))
        return out


@dataclass(frozen=True)
class Signal:
    """Something measured, with the unit it was measured at. NaN means not measured, never 0.

    Args:
        values: [U, *D] for the units "batch" (U = 1), "group" (G), "trajectory" (N) or the name of a span set (S);
            [B, T, *D] for the unit "token".
        unit: "batch" | "group" | "trajectory" | "token" | the name of a span set.
        axes: the names of the axes D (critiques, attributes, factors).
    """

    values: Float[Tensor, "..."]
    unit: str
    axes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """A batch of what was sampled (or demonstrated), right-padded, with everything measured about it.

    A row is one sequence the learner reads: context, actions, right padding. Every [B, T] field is aligned with
    positions: entry t belongs to `tokens[:, t]` (logits already shifted).

    Args:
        lengths: positions in use in each row, [B].
        action_mask: positions that may carry credit; False on prompts, tool output and padding, [B, T].
        group_ids: what is compared with each other; dense ids 0..G-1, [B].
        trajectory_ids: dense ids 0..N-1; a trajectory lies in one group, [B].
        row_index: place of the row in its trajectory, [B].
        tokens: ids of any vocabulary, [B, T].
        actions: continuous actions, [B, T, *A].
        truncated: the row was cut by a limit rather than ended by the policy, [B].
        covers: how much a correct statistic can see in this batch; set by whoever slices.
        logprobs: behaviour log-probabilities in nats, as sampled, [B, T].
        old_logprobs: the learner's own at the start of the update; None = on-policy, [B, T].
        ref_logprobs: the reference model's, [B, T].
        values: V of the state before position t, [B, T].
        bootstrap: V after the cut of a truncated row, [B]; None = 0.
        off_policy: the behaviour prompt or model differs from what is trained, [B].
        spans: `Spans` by name. signals: `Signal` by name. meta: one list of B things by name, never read by credit.
    """

    lengths: Int[Tensor, " B"]
    action_mask: Bool[Tensor, "B T"]
    group_ids: Int[Tensor, " B"]
    trajectory_ids: Int[Tensor, " B"]
    row_index: Int[Tensor, " B"]
    tokens: Int[Tensor, "B T"] | None = None
    actions: Float[Tensor, "B T ..."] | None = None
    truncated: Bool[Tensor, " B"] | None = None
    covers: Cover = "batch"
    logprobs: Float[Tensor, "B T"] | None = None
    old_logprobs: Float[Tensor, "B T"] | None = None
    ref_logprobs: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    bootstrap: Float[Tensor, " B"] | None = None
    off_policy: Bool[Tensor, " B"] | None = None
    spans: Mapping[str, Spans] = field(default_factory=dict)
    signals: Mapping[str, Signal] = field(default_factory=dict)
    meta: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("spans", "signals", "meta"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        _check_rows(self)
        _check_ids(self)
        for name, spans in self.spans.items():
            _check_spans(self, name, spans)
        for name, signal in self.signals.items():
            _check_signal(self, name, signal)
        for name, column in self.meta.items():
            if len(column) != self.batch:
                raise ValueError(
                    f"meta[{name!r}] has {len(column)} entries but the batch has {self.batch} rows. Give one per row."
                )

    # ---- sizes ----------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self.action_mask.shape[0]

    @property
    def width(self) -> int:
        """T, the padded number of positions."""
        return self.action_mask.shape[1]

    @cached_property
    def num_trajectories(self) -> int:
        """N."""
        return int(self.trajectory_ids.max()) + 1 if self.batch else 0

    @cached_property
    def num_groups(self) -> int:
        """G."""
        return int(self.group_ids.max()) + 1 if self.batch else 0

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.action_mask.device

    @cached_property
    def trajectory_groups(self) -> Int[Tensor, " N"]:
        """The group each trajectory lies in."""
        out = self.group_ids.new_zeros(self.num_trajectories)
        return out.scatter_(0, self.trajectory_ids, self.group_ids)

    # ---- from units to positions --------------------------------------------------------------------------------

    def span_ids(self, name: str) -> Int[Tensor, "B T"]:
        """Which span of the named set covers each position; -1 where none does."""
        spans = self.spans[name]
        which = (spans.stop > spans.start).nonzero()[:, 0]
        start = spans.row[which] * self.width + spans.start[which]
        if bool((start[1:] < start[:-1]).any()):
            start, order = start.sort()
            which = which[order]
        stop = start + (spans.stop - spans.start)[which]
        ids, sizes = start.new_full((2, 2 * len(which) + 1), -1).unbind()  # gap, span, gap, ..., span, gap
        ids[1::2], sizes[1::2] = which, stop - start
        sizes[0::2] = torch.cat([start, start.new_tensor([self.batch * self.width])])
        sizes[2::2] -= stop
        return torch.repeat_interleave(ids, sizes, output_size=self.batch * self.width).view(self.batch, self.width)

    def unit_ids(self, unit: str) -> Int[Tensor, "B T"]:
        """The index, at the given unit, that each position belongs to; -1 where it belongs to none."""
        shape = (self.batch, self.width)
        if unit == "batch":
            return torch.zeros(shape, dtype=torch.int64, device=self.device)
        if unit == "group":
            return self.group_ids[:, None].expand(shape)
        if unit == "trajectory":
            return self.trajectory_ids[:, None].expand(shape)
        if unit == "token":
            return torch.arange(self.batch * self.width, device=self.device).view(shape)
        return self.span_ids(unit)

    def at_tokens(self, signal: Signal) -> Float[Tensor, "B T ..."]:
        """The signal's value at each position; 0 at positions outside every span of a span signal."""
        if signal.unit == "token":
            return signal.values
        if signal.unit in ("batch", "group", "trajectory"):
            rows = self.unit_ids(signal.unit)[:, :1]
            return signal.values[rows].expand(self.batch, self.width, *signal.values.shape[1:])
        ids = self.unit_ids(signal.unit)
        table = torch.cat([signal.values, signal.values.new_zeros(1, *signal.values.shape[1:])])  # [-1] is 0
        return torch.take(table, ids) if table.dim() == 1 else table[ids]

    def units(self, unit: str) -> int:
        """How many values a signal of this unit has along its first axis (B for "token")."""
        sizes = {"batch": 1, "group": self.num_groups, "trajectory": self.num_trajectories, "token": self.batch}
        return sizes[unit] if unit in sizes else len(self.spans[unit])

    # ---- derived batches ------------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> "Rollouts":
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def with_spans(self, **spans: Spans) -> "Rollouts":
        """A copy with more span sets."""
        return replace(self, spans={**self.spans, **spans})

    def with_signals(self, **signals: Signal) -> "Rollouts":
        """A copy with more signals."""
        return replace(self, signals={**self.signals, **signals})

    def select(self, rows: Int[Tensor, " R"], covers: Cover = "row") -> "Rollouts":
        """Some of the rows, in the order given, with their spans and signals; ids are made dense again.

        Args:
            covers: what a correct statistic can still see in the slice; say "group" when whole groups were taken.
        """
        _, groups = torch.unique(self.group_ids[rows], return_inverse=True)
        _, trajectories = torch.unique(self.trajectory_ids[rows], return_inverse=True)
        kept = {name: _kept_spans(spans, rows, self.batch) for name, spans in self.spans.items()}
        units = {
            "batch": torch.zeros(1, dtype=torch.int64, device=self.device),
            "group": torch.unique(self.group_ids[rows]),
            "trajectory": torch.unique(self.trajectory_ids[rows]),
            "token": rows,
            **{name: which for name, (_, which) in kept.items()},
        }
        changes: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = value[rows]
        changes.update(
            group_ids=groups,
            trajectory_ids=trajectories,
            covers=covers,
            spans={name: spans for name, (spans, _) in kept.items()},
            signals={k: replace(v, values=v.values[units[v.unit]]) for k, v in self.signals.items()},
            meta={k: [v[i] for i in rows.tolist()] for k, v in self.meta.items()},
        )
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> "Rollouts":
        """A copy on another device."""
        return self._map_tensors(lambda x: x.to(device))

    def _map_tensors(self, move: Callable[[Tensor], Tensor]) -> "Rollouts":
        changes: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = move(value)
        changes["spans"] = {k: Spans(**_moved(v, move)) for k, v in self.spans.items()}
        changes["signals"] = {k: replace(v, values=move(v.values)) for k, v in self.signals.items()}
        return replace(self, **changes)

    # ---- constructors ---------------------------------------------------------------------------------------------

    @classmethod
    def from_lists(
        cls,
        tokens: Sequence[Sequence[int]],
        groups: Sequence[Any],
        *,
        outcome: Sequence[float] | None = None,
        steps: Sequence[Sequence[tuple[int, int]]] | None = None,
        judge: Sequence[Sequence[Sequence[float]]] | None = None,
        process: Sequence[Sequence[float]] | None = None,
        action_mask: Sequence[Sequence[bool]] | None = None,
        logprobs: Sequence[Sequence[float]] | None = None,
        old_logprobs: Sequence[Sequence[float]] | None = None,
        ref_logprobs: Sequence[Sequence[float]] | None = None,
        values: Sequence[Sequence[float]] | None = None,
        bootstrap: Sequence[float] | None = None,
        truncated: Sequence[bool] | None = None,
        trajectories: Sequence[Any] | None = None,
        row_index: Sequence[int] | None = None,
        spans: Mapping[str, Spans] | None = None,
        signals: Mapping[str, Signal] | None = None,
        meta: Mapping[str, Sequence[Any]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Rollouts":
        """Build a batch from nested Python lists, one entry per row.

        Args:
            tokens: token ids of each row. groups: any hashable label per row; made dense in order of appearance.
            outcome: one outcome reward per trajectory (per row where every row is a trajectory), signal "outcome".
            steps: `(start, stop)` pairs per row, the spans "step".
            judge: per row, per step, one verdict per critique (1 = this critique calls the step wrong, 0 = not,
                NaN = unusable), the signal "judge" [S, critiques].
            process: per row, one process reward per step, the signal "process" [S].
            action_mask: default: every token of the row.
            trajectories: any hashable label per row; default: every row is its own trajectory.

        Example:
            >>> r = Rollouts.from_lists([[5, 6], [5, 7, 8]], [0, 0], outcome=[1.0, 0.0])
            >>> r.lengths, r.signals["outcome"].values
            (tensor([2, 3]), tensor([1., 0.]))
        """
        lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
        width = int(lengths.max()) if len(tokens) else 0
        trajectory_ids = _dense(trajectories if trajectories is not None else range(len(tokens)))
        made_spans = dict(spans or {})
        made = dict(signals or {})
        if steps is not None:
            made_spans["step"] = Spans.from_lists(steps)
        if outcome is not None:
            made["outcome"] = Signal(torch.tensor(list(outcome), dtype=dtype), "trajectory")
        if process is not None:
            made["process"] = Signal(torch.tensor([v for row in process for v in row], dtype=dtype), "step")
        if judge is not None:
            flat = [list(step) for row in judge for step in row]
            critiques = len(flat[0]) if flat else 0
            if any(len(step) != critiques for step in flat):
                raise ValueError(
                    "judge needs the same number of critiques for every step. Use NaN for an unusable one."
                )
            made["judge"] = Signal(
                torch.tensor(flat, dtype=dtype).reshape(len(flat), critiques), "step", ("critiques",)
            )

        def floats(rows: Sequence[Sequence[float]] | None, name: str) -> Tensor | None:
            return None if rows is None else _padded(rows, lengths, width, dtype, 0.0, name)

        mask = action_mask if action_mask is not None else [[True] * len(row) for row in tokens]
        return cls(
            tokens=_padded(tokens, lengths, width, torch.int64, 0, "tokens"),
            lengths=lengths,
            action_mask=_padded(mask, lengths, width, torch.bool, False, "action_mask"),
            group_ids=_dense(groups),
            trajectory_ids=trajectory_ids,
            row_index=torch.tensor(list(row_index), dtype=torch.int64)
            if row_index is not None
            else _places(trajectory_ids),
            truncated=None if truncated is None else torch.tensor(list(truncated), dtype=torch.bool),
            logprobs=floats(logprobs, "logprobs"),
            old_logprobs=floats(old_logprobs, "old_logprobs"),
            ref_logprobs=floats(ref_logprobs, "ref_logprobs"),
            values=floats(values, "values"),
            bootstrap=None if bootstrap is None else torch.tensor(list(bootstrap), dtype=dtype),
            spans=made_spans,
            signals=made,
            meta=meta or {},
        )


@dataclass(frozen=True)
class Credit:
    """Who gets the credit: one advantage per position, and what each is made of.

    Args:
        advantages: what the loss multiplies, [B, T]; 0 wherever `mask` is False.
        mask: what the loss counts, a subset of `action_mask`; not the same as advantage 0, [B, T].
        parts: named signals, each at its own unit, whose values at the positions add up to the advantage.
        returns: a critic's target, [B, T]; no transform touches it.
        notes: what a reader of the run should know (branch fraction, share of zero-signal groups, ...).
    """

    advantages: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    parts: Mapping[str, Signal] = field(default_factory=dict)
    returns: Float[Tensor, "B T"] | None = None
    notes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))
        object.__setattr__(self, "notes", MappingProxyType(dict(self.notes)))

    def scaled(self, factor: float | Float[Tensor, "B T"], rollouts: Rollouts) -> "Credit":
        """Every advantage and every part times `factor`; a per-position factor moves the parts to positions."""
        if not isinstance(factor, Tensor):
            parts = {k: replace(v, values=v.values * factor) for k, v in self.parts.items()}
        else:
            parts = {k: Signal(rollouts.at_tokens(v) * factor, "token") for k, v in self.parts.items()}
        scaled = torch.where(self.mask, self.advantages * factor, 0.0)
        return replace(self, advantages=scaled, parts=parts)

    def replaced(self, advantages: Float[Tensor, "B T"], name: str) -> "Credit":
        """Other advantages; the difference, after minus before, becomes the part `name`."""
        advantages = torch.where(self.mask, advantages, 0.0)
        while name in self.parts:
            name += "'"
        parts = {**self.parts, name: Signal(advantages - self.advantages, "token")}
        return replace(self, advantages=advantages, parts=parts)

    def narrowed(self, mask: Bool[Tensor, "B T"]) -> "Credit":
        """The loss counts only positions in `mask` too; advantages outside become 0."""
        mask = self.mask & mask
        return replace(self, advantages=torch.where(mask, self.advantages, 0.0), mask=mask)

    def select(self, rows: Int[Tensor, " R"]) -> "Credit":
        """Some of the rows, without the parts: what a loss needs for a micro-batch."""
        returns = None if self.returns is None else self.returns[rows]
        return replace(self, advantages=self.advantages[rows], mask=self.mask[rows], returns=returns, parts={})

    def total(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The parts added up at each position in the mask: the advantage again, up to rounding."""
        out = torch.zeros_like(self.advantages)
        for part in self.parts.values():
            out = out + rollouts.at_tokens(part)
        return torch.where(self.mask, out, 0.0)


# ---- validation -------------------------------------------------------------------------------------------------------


def _check_rows(r: Rollouts) -> None:
    if r.action_mask.dim() != 2 or r.action_mask.dtype != torch.bool:
        raise ValueError(
            f"action_mask must be a bool tensor [B, T]; got {r.action_mask.dtype} {list(r.action_mask.shape)}."
        )
    shape = tuple(r.action_mask.shape)
    for name in ("tokens", "logprobs", "old_logprobs", "ref_logprobs", "values"):
        x = getattr(r, name)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)} but action_mask has {list(shape)}. Give one value per position."
            )
    if r.actions is not None and tuple(r.actions.shape[:2]) != shape:
        raise ValueError(f"actions start with shape {list(r.actions.shape[:2])} but action_mask has {list(shape)}.")
    for name in ("lengths", "group_ids", "trajectory_ids", "row_index", "truncated", "bootstrap", "off_policy"):
        x = getattr(r, name)
        if x is not None and tuple(x.shape) != shape[:1]:
            raise ValueError(
                f"{name} has shape {list(x.shape)} but the batch has {shape[0]} rows. Give one value per row."
            )
    if r.covers not in ("row", "group", "batch"):
        raise ValueError(f"covers must be 'row', 'group' or 'batch'; got {r.covers!r}.")
    if not r.batch:
        return
    if int(r.lengths.min()) < 0 or int(r.lengths.max()) > r.width:
        raise ValueError(f"lengths must lie in 0..{r.width}; got {int(r.lengths.min())}..{int(r.lengths.max())}.")
    beyond = torch.arange(r.width, device=r.device) >= r.lengths[:, None]
    if bool((r.action_mask & beyond).any()):
        row = int((r.action_mask & beyond).any(1).nonzero()[0])
        raise ValueError(
            f"action_mask of row {row} is True beyond its length {int(r.lengths[row])}. Padding carries no credit."
        )


def _check_ids(r: Rollouts) -> None:
    if not r.batch:
        return
    for name in ("group_ids", "trajectory_ids"):
        ids = getattr(r, name)
        low, top = int(ids.min()), int(ids.max())
        if low < 0 or top >= r.batch or int((torch.bincount(ids) == 0).sum()):
            raise ValueError(
                f"{name} must be dense, 0..n-1 with none left out; got {low}..{top}. Relabel them in order of appearance."
            )
    if bool((r.trajectory_groups[r.trajectory_ids] != r.group_ids).any()):
        raise ValueError("a trajectory lies in two groups. Give all rows of a trajectory the same group id.")


def _check_spans(r: Rollouts, name: str, s: Spans) -> None:
    if name in _UNITS:
        raise ValueError(f"spans cannot be named {name!r}: that is a unit of signals. Choose another name.")
    for other in ("start", "stop", "index", "state", "parent"):
        x = getattr(s, other)
        if x is not None and x.shape != s.row.shape:
            raise ValueError(f"spans[{name!r}].{other} has {len(x)} entries but .row has {len(s)}. Give one per span.")
    if not len(s):
        return
    if int(s.row.min()) < 0 or int(s.row.max()) >= r.batch:
        raise ValueError(f"spans[{name!r}] names row {int(s.row.max())} but the batch has {r.batch} rows.")
    bad = (s.start < 0) | (s.stop < s.start) | (s.stop > r.lengths[s.row])
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"spans[{name!r}] number {i} is [{int(s.start[i])}, {int(s.stop[i])}) but row {int(s.row[i])} "
            f"has {int(r.lengths[s.row[i]])} positions. Spans are half-open and lie inside their row."
        )
    order = torch.argsort((s.row * (r.width + 1) + s.start) * (r.width + 1) + s.stop, stable=True)
    row, start, stop = s.row[order], s.start[order], s.stop[order]
    clash = (row[1:] == row[:-1]) & (start[1:] < stop[:-1])
    if bool(clash.any()):
        raise ValueError(f"spans[{name!r}] overlap in row {int(row[1:][clash][0])}. Spans of one name do not overlap.")


def _check_signal(r: Rollouts, name: str, s: Signal) -> None:
    if s.unit not in _UNITS and s.unit not in r.spans:
        known = ", ".join([*_UNITS, *r.spans])
        raise ValueError(
            f"signals[{name!r}] has unit {s.unit!r}, which is neither a unit nor a span set. Known here: {known}."
        )
    if not s.values.is_floating_point():
        raise ValueError(
            f"signals[{name!r}] has dtype {s.values.dtype}. Signals are floating point; NaN means not measured."
        )
    if s.unit == "token":
        if tuple(s.values.shape[:2]) != (r.batch, r.width):
            raise ValueError(
                f"signals[{name!r}] has shape {list(s.values.shape)} but action_mask has {[r.batch, r.width]}."
            )
        return
    want, got = r.units(s.unit), s.values.shape[0]
    if want != got:
        what = f"spans[{s.unit!r}] has {want}" if s.unit in r.spans else f"the batch has {want} of unit {s.unit!r}"
        one = "span" if s.unit in r.spans else s.unit
        raise ValueError(
            f"signals[{name!r}] has {got} values but {what}. Give one value per {one}; use NaN where nothing was measured."
        )


# ---- small helpers ------------------------------------------------------------------------------------------------------


def _dense(labels: Sequence[Any] | range) -> Int[Tensor, " B"]:
    seen: dict[Any, int] = {}
    return torch.tensor([seen.setdefault(x, len(seen)) for x in labels], dtype=torch.int64)


def _places(trajectory_ids: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    seen: dict[int, int] = {}
    out = []
    for n in trajectory_ids.tolist():
        out.append(seen.get(n, 0))
        seen[n] = out[-1] + 1
    return torch.tensor(out, dtype=torch.int64)


def _padded(
    rows: Sequence[Sequence[Any]], lengths: Tensor, width: int, dtype: torch.dtype, fill: Any, name: str
) -> Tensor:
    for b, (row, n) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        if len(row) != n:
            raise ValueError(
                f"{name} of row {b} has {len(row)} entries but the row has {n} tokens. Give one per token."
            )
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype).reshape(len(rows), width)


def _kept_spans(spans: Spans, rows: Tensor, batch: int) -> tuple[Spans, Tensor]:
    """The spans of the chosen rows, renumbered, and which of the old ones they are."""
    place = rows.new_full((batch,), -1).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    which = (place[spans.row] >= 0).nonzero()[:, 0]
    columns: dict[str, Any] = {k: None if v is None else v[which] for k, v in _columns(spans).items()}
    new = which.new_full((len(spans) + 1,), -1).scatter_(0, which, torch.arange(len(which), device=rows.device))
    if spans.parent is not None:
        columns["parent"] = new[spans.parent[which]]  # new[-1] stays -1, the root
    columns["row"] = place[spans.row[which]]
    return Spans(**columns), which


def _columns(spans: Spans) -> dict[str, Any]:
    return {f.name: getattr(spans, f.name) for f in fields(spans)}


def _moved(spans: Spans, move: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: None if v is None else move(v) for k, v in _columns(spans).items()}

"""Logs of rollouts as JSON lines: the door for what somebody else's trainer sampled. Schema: docs/record.md."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from apportion.types import Credit, Rollouts, Signal, Spans

_POSITIONS = ("logprobs", "old_logprobs", "ref_logprobs", "values")
_ROWS = {"row_index": int, "truncated": bool, "bootstrap": float, "off_policy": bool}
_SHORT = ("steps", "outcome", "judge", "process")
_KNOWN = {"tokens", "group", "trajectory", "action_mask", *_ROWS, *_POSITIONS, *_SHORT, "spans", "signals"}
_CREDIT = {"advantages", "credit_mask", "returns", "parts"}
_WHOLE = ("batch", "group", "trajectory")


@dataclass(frozen=True)
class _Line:
    """One line of a file: what it says, and where it stands, for messages."""

    path: Path
    number: int
    entry: dict[str, Any]

    def fail(self, text: str) -> NoReturn:
        raise ValueError(f"{self.path} line {self.number}: {text}")

    def __len__(self) -> int:
        name = "tokens" if self.entry.get("tokens") is not None else "pieces"
        if not isinstance(self.entry.get(name), list):
            self.fail('needs "tokens" (a list of token ids) or "pieces" (a list of token texts).')
        return len(self.entry[name])

    def numbers(self, field: str, values: Any) -> Any:
        """Numbers, true/false and null (NaN), nested in lists of equal length, as an array."""
        try:
            return np.array(_floats(values), dtype=np.float64)
        except ValueError:
            self.fail(f"{field} has lists of different lengths. Give every entry the same number of values.")
        except TypeError as error:
            self.fail(f"{field} holds {error}. Give numbers, or null where nothing was measured.")

    def per_token(self, field: str) -> list[float]:
        if field not in self.entry:
            self.fail(f"{field} is missing here but given on other lines. Give it on every line or on none.")
        values = self.entry[field]
        if not isinstance(values, list) or len(values) != len(self):
            got = f"{len(values)} values" if isinstance(values, list) else repr(values)
            self.fail(f"{field} has {got} but the row has {len(self)} tokens. Give one value per token.")
        row = self.numbers(field, values)
        if row.shape != (len(self),):
            self.fail(f"{field} has lists inside. Give one number per token.")
        out: list[float] = row.tolist()
        return out

    def scalar(self, field: str, default: float) -> float:
        value = self.entry.get(field, default)
        if isinstance(value, list | dict | str):
            self.fail(f"{field} is {value!r}. Give one number.")
        return default if value is None else float(value)

    def label(self, field: str, default: str | None = None) -> str:
        value = self.entry.get(field)
        value = default if value is None else value
        if value is None or isinstance(value, list | dict):
            self.fail(f'needs "{field}": a number or text, equal on the lines that belong together.')
        return str(value)


def read_jsonl(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Rollouts:
    """Read rollouts from a file with one JSON object per line, one line per row.

    Args:
        path: the file. Each line needs "group" and "tokens" or "pieces"; docs/record.md lists every key. Keys that
            the schema does not know become `meta`.
        dtype: of every floating-point field.

    Raises:
        ValueError: a line is broken; the message names file, line and field.
    """
    lines = [_checked(line) for line in _lines(Path(path))]
    if not lines:
        raise ValueError(f"{path} has no rollouts: every line is blank. Give one JSON object per line.")
    entries = [line.entry for line in lines]
    positions: dict[str, Any] = {
        name: [line.per_token(name) for line in lines] for name in _POSITIONS if _any(entries, name)
    }
    rows: dict[str, Any] = {
        name: [make(line.scalar(name, 0.0)) for line in lines] for name, make in _ROWS.items() if _any(entries, name)
    }
    lists: dict[str, Any] = {
        "tokens": _tokens(lines),
        "groups": _dense(line.label("group") for line in lines),
        "trajectories": _dense(line.label("trajectory", f"line {line.number}") for line in lines),
        "action_mask": [[bool(x) for x in _mask(line)] for line in lines],
        "meta": _meta(entries),
    }
    off_policy = rows.pop("off_policy", None)
    with _naming(path):
        bare = Rollouts.from_lists(**lists, **rows, **positions, dtype=dtype)
    if off_policy is not None:
        bare = bare.replace(off_policy=torch.tensor(off_policy))
    return _with_measured(bare, lines, dtype)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Rows that are fine each, but not together, are an error of the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_jsonl(path: str | Path, rollouts: Rollouts, credit: Credit | None = None) -> None:
    """Write rollouts, and the credit they were given, as one JSON object per row.

    `read_jsonl` restores what the schema holds: everything except the states, parents and custom ordinals of spans and
    the bits of the padding. A run folder (`RunWriter`) keeps those too.
    """
    with open(path, "w", encoding="utf-8") as file:
        for entry in to_dicts(rollouts, credit):
            file.write(json.dumps(entry) + "\n")


def to_dicts(rollouts: Rollouts, credit: Credit | None = None) -> Iterator[dict[str, Any]]:
    """The rows of `write_jsonl` as dictionaries, in order."""
    rollouts = rollouts.to("cpu")
    if rollouts.actions is not None:
        raise ValueError("JSON lines hold tokens, and this batch has continuous actions. Record it as a run folder.")
    if clash := sorted(set(rollouts.meta) & (_KNOWN | _CREDIT)):
        raise ValueError(f"meta[{clash[0]!r}] has the name of a key of the schema. Rename it before writing.")
    return (_row(rollouts, credit, b) for b in range(rollouts.batch))


# ---- reading ----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[_Line]:
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"{path} is not a file. Give a JSON lines file, one rollout per line.")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield _Line(path, number, _object(path, number, raw))


def _object(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} line {number}: not JSON: {error}.") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{path} line {number}: is {type(entry).__name__}, but each line must be a JSON object.")
    return entry


def _checked(line: _Line) -> _Line:
    """The line with its short forms (steps, outcome, judge, process) spelt out as spans and signals."""
    entry, size = dict(line.entry), len(line)
    pieces = entry.get("pieces")
    if pieces is not None and (not isinstance(pieces, list) or len(pieces) != size):
        got = f"{len(pieces)} entries" if isinstance(pieces, list) else repr(pieces)[:80]
        line.fail(f"pieces has {got} but the row has {size} tokens. Give one text per token.")
    spans = dict(_mapping(line, "spans"))
    signals = dict(_mapping(line, "signals"))
    if entry.get("steps") is not None:
        spans["step"] = entry["steps"]
    if "outcome" in entry:
        signals["outcome"] = {"unit": "trajectory", "values": entry["outcome"]}
    if entry.get("process") is not None:
        signals["process"] = {"unit": "step", "values": entry["process"]}
    if entry.get("judge") is not None:
        signals["judge"] = {"unit": "step", "axes": ["critiques"], "values": _critiques(entry["judge"])}
    checked = {name: _pairs(line, _shown(name), pairs) for name, pairs in spans.items()}
    return _Line(line.path, line.number, {**entry, "spans": checked, "signals": signals})


def _mapping(line: _Line, name: str) -> dict[str, Any]:
    value = line.entry.get(name) or {}
    if not isinstance(value, dict):
        line.fail(f"{name} must be an object of named entries; got {value!r}.")
    return value


def _shown(span_set: str) -> str:
    return "steps" if span_set == "step" else f"spans.{span_set}"


def _critiques(judge: Any) -> Any:
    """One verdict per step is one critique."""
    return [x if isinstance(x, list) else [x] for x in judge] if isinstance(judge, list) else judge


def _pairs(line: _Line, field: str, pairs: Any) -> list[tuple[int, int]]:
    if not isinstance(pairs, list) or not all(_is_pair(p) for p in pairs):
        line.fail(f"{field} must be a list of [start, stop] pairs of whole numbers; got {pairs!r:.80}.")
    for start, stop in pairs:
        if not 0 <= start <= stop <= len(line):
            line.fail(
                f"{field} has [{start}, {stop}] but the row has {len(line)} tokens. Spans are half-open and lie inside."
            )
    ordered = sorted(pairs)
    if any(a[1] > b[0] for a, b in pairwise(ordered)):
        line.fail(f"{field} overlap. Spans of one name do not overlap.")
    return [(start, stop) for start, stop in pairs]


def _is_pair(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(type(y) is int for y in x)


def _tokens(lines: list[_Line]) -> list[list[int]]:
    """Token ids; where the file has none, texts of tokens numbered in order of appearance."""
    if not _any([line.entry for line in lines], "tokens"):
        ids = iter(_dense(str(x) for line in lines for x in line.entry["pieces"]))
        return [[next(ids) for _ in line.entry["pieces"]] for line in lines]
    for line in lines:
        tokens = line.entry.get("tokens")
        if tokens is None or not all(type(x) is int and 0 <= x < 2**63 for x in tokens):
            line.fail("tokens must be whole numbers, one per token, on every line of the file or on none.")
    return [line.entry["tokens"] for line in lines]


def _mask(line: _Line) -> list[float]:
    return line.per_token("action_mask") if "action_mask" in line.entry else [1.0] * len(line)


def _dense(labels: Iterable[str]) -> list[int]:
    seen: dict[str, int] = {}
    return [seen.setdefault(label, len(seen)) for label in labels]


def _any(entries: Sequence[dict[str, Any]], name: str) -> bool:
    return any(entry.get(name) is not None for entry in entries)


def _meta(entries: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(k for entry in entries for k in entry if k not in _KNOWN | _CREDIT)
    return {name: [entry.get(name) for entry in entries] for name in names}


def _with_measured(bare: Rollouts, lines: list[_Line], dtype: torch.dtype) -> Rollouts:
    span_sets = _names(line.entry["spans"] for line in lines)
    spans = {name: _spans(bare, [line.entry["spans"].get(name, []) for line in lines]) for name in span_sets}
    signals = {}
    for name in _names(line.entry["signals"] for line in lines):
        first = next(line for line in lines if name in line.entry["signals"])
        if (unit := _unit(first, name)[0]) not in (known := (*_WHOLE, "token", *spans)):
            first.fail(f"signals.{name} has unit {unit!r}, which is not known here. Give one of: {', '.join(known)}.")
        signals[name] = _signal(bare, lines, name, dtype)
    with _naming(lines[0].path):
        return bare.replace(spans=spans, signals=signals)


def _names(mappings: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _spans(rollouts: Rollouts, pairs: list[list[tuple[int, int]]]) -> Spans:
    """The ordinal counts on through the rows of a trajectory."""
    spans = Spans.from_lists(pairs)
    before = torch.zeros(rollouts.batch, dtype=torch.int64)
    seen = [0] * rollouts.num_trajectories
    for b in np.lexsort((rollouts.row_index.numpy(), rollouts.trajectory_ids.numpy())).tolist():
        n = int(rollouts.trajectory_ids[b])
        before[b] = seen[n]
        seen[n] += len(pairs[b])
    return Spans(spans.row, spans.start, spans.stop, spans.index + before[spans.row])


def _signal(rollouts: Rollouts, lines: list[_Line], name: str, dtype: torch.dtype) -> Signal:
    first = next(line for line in lines if name in line.entry["signals"])
    unit, axes = _unit(first, name)
    cells: list[Any] = [None] * len(lines)
    for b, line in enumerate(lines):
        if name in line.entry["signals"]:
            if _unit(line, name) != (unit, axes):
                line.fail(f"signals.{name} has another unit or other axes than on line {first.number}.")
            cells[b] = _measured(line, name, unit, len(axes))
    shapes = [None if c is None else c.shape if unit in _WHOLE else c.shape[1:] for c in cells]
    inner = next((shape for shape in shapes if shape is not None), (0,) * len(axes))
    for line, shape in zip(lines, shapes, strict=True):
        if shape not in (None, inner):
            line.fail(f"{_called(name)} has entries of shape {list(shape or ())}; other lines have {list(inner)}.")
    values = _whole(rollouts, lines, cells, name, unit, inner) if unit in _WHOLE else _spread(lines, cells, unit, inner)
    if unit == "token":
        values = _pad(values, rollouts, inner)
    return Signal(torch.from_numpy(values).to(dtype), unit, axes)


def _called(name: str) -> str:
    return name if name in _SHORT else f"signals.{name}"


def _unit(line: _Line, name: str) -> tuple[str, tuple[str, ...]]:
    given = line.entry["signals"][name]
    if not isinstance(given, dict) or not isinstance(given.get("unit"), str) or "values" not in given:
        line.fail(f'signals.{name} needs "unit" and "values"; got {given!r:.80}.')
    axes = given.get("axes") or []
    if not isinstance(axes, list) or not all(isinstance(axis, str) for axis in axes):
        line.fail(f"signals.{name}.axes must be a list of names; got {axes!r:.80}.")
    return given["unit"], tuple(axes)


def _measured(line: _Line, name: str, unit: str, axes: int) -> Any:
    """This line's values: one cell, or one per token or span, as an array; None if it says nothing."""
    values = line.entry["signals"][name]["values"]
    if values is None:
        return None
    array = line.numbers(_called(name), values)
    if unit not in _WHOLE:
        want = len(line) if unit == "token" else len(line.entry["spans"].get(unit, []))
        what = "tokens" if unit == "token" else _shown(unit)
        if array.ndim == 0 or array.shape[0] != want:
            got = "one value" if array.ndim == 0 else f"{array.shape[0]} values"
            line.fail(
                f"{_called(name)} has {got} but the row has {want} {what}. Give one per entry, null if not measured."
            )
    if array.size and array.ndim != axes + (unit not in _WHOLE):
        line.fail(
            f"{_called(name)} has {array.ndim} levels of lists; its unit and axes ask for {axes + (unit not in _WHOLE)}."
        )
    return array if array.size else None


def _whole(rollouts: Rollouts, lines: list[_Line], cells: list[Any], name: str, unit: str, inner: Any) -> Any:
    """One cell per batch, group or trajectory: what its lines say, if they agree."""
    ids = {"batch": [0] * len(lines), "group": rollouts.group_ids.tolist()}.get(unit, rollouts.trajectory_ids.tolist())
    out = np.full((max(ids) + 1, *inner), np.nan)
    said: set[int] = set()
    for unit_id, line, cell in zip(ids, lines, cells, strict=True):
        if cell is None:
            continue
        if unit_id in said and not np.array_equal(out[unit_id], cell, equal_nan=True):
            line.fail(f"{_called(name)} differs from another line of the same {unit}. Give one value per {unit}.")
        out[unit_id] = cell
        said.add(unit_id)
    return out


def _spread(lines: list[_Line], cells: list[Any], unit: str, inner: Any) -> Any:
    """The cells of all lines one after another; NaN for a line that says nothing."""
    sizes = [len(line) if unit == "token" else len(line.entry["spans"].get(unit, [])) for line in lines]
    full = [
        np.full((n, *inner), np.nan) if c is None else c.reshape(n, *inner) for n, c in zip(sizes, cells, strict=True)
    ]
    return np.concatenate(full)


def _pad(flat: Any, rollouts: Rollouts, inner: Any) -> Any:
    out = np.full((rollouts.batch, rollouts.width, *inner), np.nan)
    out[np.arange(rollouts.width) < rollouts.lengths.numpy()[:, None]] = flat
    return out


def _floats(x: Any) -> Any:
    if isinstance(x, list):
        return [_floats(y) for y in x]
    if x is None:
        return float("nan")
    if isinstance(x, bool | int | float):
        return float(x)
    raise TypeError(repr(x)[:80])


# ---- writing ----------------------------------------------------------------------------------------------------------


def _row(rollouts: Rollouts, credit: Credit | None, b: int) -> dict[str, Any]:
    size = int(rollouts.lengths[b])
    entry: dict[str, Any] = {name: column[b] for name, column in rollouts.meta.items()}
    if rollouts.tokens is not None:
        entry["tokens"] = rollouts.tokens[b, :size].tolist()
    entry["group"] = int(rollouts.group_ids[b])
    if rollouts.num_trajectories < rollouts.batch:
        entry["trajectory"] = int(rollouts.trajectory_ids[b])
        entry["row_index"] = int(rollouts.row_index[b])
    entry["action_mask"] = rollouts.action_mask[b, :size].long().tolist()
    for name in ("truncated", "off_policy", "bootstrap"):
        if (x := getattr(rollouts, name)) is not None:
            entry[name] = _plain(x[b])
    for name in _POSITIONS:
        if (x := getattr(rollouts, name)) is not None:
            entry[name] = _plain(x[b, :size])
    return {**entry, **_measured_row(rollouts, b), **(_credit_row(rollouts, credit, b) if credit else {})}


def _measured_row(rollouts: Rollouts, b: int) -> dict[str, Any]:
    pairs = {}
    for name, s in rollouts.spans.items():
        mine = s.row == b
        pairs[name] = torch.stack([s.start[mine], s.stop[mine]], 1).tolist()
    short = {"steps": pairs.pop("step")} if "step" in pairs else {}
    signals = {name: _signal_row(rollouts, signal, b) for name, signal in rollouts.signals.items()}
    usual = {"outcome": ("trajectory", ()), "judge": ("step", ("critiques",)), "process": ("step", ())}
    for name, shape in usual.items():
        if name in signals and (rollouts.signals[name].unit, rollouts.signals[name].axes) == shape:
            short[name] = signals.pop(name)["values"]
    return short | ({"spans": pairs} if pairs else {}) | ({"signals": signals} if signals else {})


def _signal_row(rollouts: Rollouts, signal: Signal, b: int) -> dict[str, Any]:
    """One row's share of a signal, at the signal's own unit."""
    values, unit = signal.values.cpu(), signal.unit
    if unit == "token":
        mine = values[b, : int(rollouts.lengths[b])]
    elif unit in _WHOLE:
        place = {"batch": 0, "group": int(rollouts.group_ids[b])}.get(unit, int(rollouts.trajectory_ids[b]))
        mine = values[place]
    else:
        mine = values[rollouts.spans[unit].row == b]
    axes = {"axes": list(signal.axes)} if signal.axes else {}
    return {"unit": unit, **axes, "values": _plain(mine)}


def _credit_row(rollouts: Rollouts, credit: Credit, b: int) -> dict[str, Any]:
    size = int(rollouts.lengths[b])
    out = {"advantages": _plain(credit.advantages[b, :size].cpu())}
    out["credit_mask"] = credit.mask[b, :size].long().tolist()
    if credit.returns is not None:
        out["returns"] = _plain(credit.returns[b, :size].cpu())
    out["parts"] = {name: _signal_row(rollouts, part, b) for name, part in credit.parts.items()}
    return out


def _plain(x: Tensor) -> Any:
    """Numbers with the fewest digits that give the same number back in the same dtype; NaN is null."""
    if x.is_floating_point():
        shortest = (
            np.asarray(x.float().numpy() if x.dtype != torch.float64 else x.numpy()).astype("U").astype(np.float64)
        )
        return _nulls(shortest.tolist())
    return x.tolist()


def _nulls(x: Any) -> Any:
    if isinstance(x, list):
        return [_nulls(y) for y in x]
    return None if x != x else x

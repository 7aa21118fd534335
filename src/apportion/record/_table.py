"""One step of a run as one Arrow table: readable columns, and enough facts in the metadata to restore every bit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from apportion.types import Credit, Rollouts, Signal, Spans

_KEY = b"apportion"
_FORMAT = 1
_PER_ROW = ("lengths", "group_ids", "trajectory_ids", "row_index", "truncated", "bootstrap", "off_policy")
_PER_POSITION = ("tokens", "action_mask", "actions", "logprobs", "old_logprobs", "ref_logprobs", "values")
_CREDIT = {"advantages": "advantages", "credit_mask": "mask", "returns": "returns"}
_WIDENED = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def to_table(step: int, rollouts: Rollouts, credit: Credit | None) -> pa.Table:
    """The table of one step; row b of the table is row b of the rollouts."""
    rollouts = rollouts.to("cpu")
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "width": rollouts.width,
        "covers": rollouts.covers,
        "tensors": {},
    }
    columns: dict[str, pa.Array] = {
        "step": pa.array(np.full(rollouts.batch, step, dtype=np.int64)),
        "row": pa.array(np.arange(rollouts.batch)),
    }
    for name in _PER_ROW:
        _put(columns, facts["tensors"], name, getattr(rollouts, name), None)
    for name in _PER_POSITION:
        _put(columns, facts["tensors"], name, getattr(rollouts, name), rollouts)
    columns["spans"], facts["spans"] = _struct({k: _encode_spans(v, rollouts) for k, v in rollouts.spans.items()})
    columns["signals"], facts["signals"] = _struct({k: _encode(v, rollouts) for k, v in rollouts.signals.items()})
    columns["meta"], facts["meta"] = _struct({k: _encode_meta(k, v) for k, v in rollouts.meta.items()})
    if credit is not None:
        _put_credit(columns, facts, credit, rollouts)
    present = {k: v for k, v in columns.items() if v is not None}
    return pa.table(present).replace_schema_metadata({_KEY: json.dumps(facts).encode()})


def rollouts_from(table: pa.Table) -> Rollouts:
    """The rollouts that `to_table` was given, bit for bit."""
    facts = facts_of(table)
    kept: dict[str, Any] = {name: _get(table, facts, name) for name in (*_PER_ROW, *_PER_POSITION)}
    spans = {k: _decode_spans(*x) for k, x in _entries(table, facts, "spans")}
    bare = Rollouts(**kept, spans=spans, covers=facts["covers"])
    signals = {k: _decode(*x, bare) for k, x in _entries(table, facts, "signals")}
    meta = {k: _decode_meta(*x) for k, x in _entries(table, facts, "meta")}
    return bare.replace(signals=signals, meta=meta)


def credit_from(table: pa.Table) -> Credit | None:
    """The credit that `to_table` was given, bit for bit; None where there was none."""
    facts = facts_of(table)
    if "notes" not in facts:
        return None
    rollouts = rollouts_from(table)
    tensors: dict[str, Any] = {field: _get(table, facts, column) for column, field in _CREDIT.items()}
    parts = {k: _decode(*x, rollouts) for k, x in _entries(table, facts, "parts")}
    return Credit(parts=parts, notes=facts["notes"], **tensors)


def facts_of(table: pa.Table) -> dict[str, Any]:
    """What the metadata says: widths, dtypes, units."""
    raw = (table.schema.metadata or {}).get(_KEY)
    if raw is None:
        raise ValueError("this Parquet file was not written by apportion: its metadata lack the key 'apportion'.")
    facts: dict[str, Any] = json.loads(raw)
    if facts["format"] != _FORMAT:
        raise ValueError(f"this Parquet file has format {facts['format']}, and this version of apportion reads 1.")
    return facts


# ---- tensors ----------------------------------------------------------------------------------------------------------


def _put(columns: dict[str, Any], facts: dict[str, Any], name: str, x: Tensor | None, per: Rollouts | None) -> None:
    """Add one field: a value per row, or (given the rollouts) a list of positions per row."""
    if x is not None:
        columns[name], facts[name] = _per_row(x) if per is None else _per_position(x, per.lengths)


def _get(table: pa.Table, facts: dict[str, Any], name: str) -> Tensor | None:
    fact = facts["tensors"].get(name)
    if fact is None:
        return None
    column = table[name].combine_chunks()
    if "fill" not in fact:
        return _tensor(_values(column, fact), fact)
    lengths = table["lengths"].to_numpy()
    return _tensor(_padded(column, fact, lengths, facts["width"]), fact)


def _per_row(x: Tensor) -> tuple[pa.Array, dict[str, Any]]:
    array = _numpy(x)
    return _cells(array), _fact(x, array.shape[1:])


def _per_position(x: Tensor, lengths: Tensor) -> tuple[pa.Array, dict[str, Any]]:
    """Lists cut at the row's length where all padding is one value, which goes to the facts; else full width."""
    array = _numpy(x)
    batch, width, *inner = array.shape
    inside = np.arange(width) < lengths.numpy()[:, None]
    padding = array[~inside].reshape(-1)
    bits = padding.view(f"u{padding.itemsize}")
    constant = bool((bits == bits[:1]).all())
    fill = (padding[:1] if padding.size else np.zeros(1, array.dtype)).tobytes().hex() if constant else None
    sizes = lengths.numpy() if constant else np.full(batch, width)
    cells = array[inside] if constant else array.reshape(batch * width, *inner)
    return _lists(sizes, _cells(cells)), {**_fact(x, tuple(inner)), "fill": fill}


def _padded(column: pa.Array, fact: dict[str, Any], lengths: Any, width: int) -> Any:
    cells = _values(column.flatten(), fact)
    shape = (len(lengths), width, *fact["inner"])
    if fact["fill"] is None:
        return cells.reshape(shape)
    out = np.full(shape, np.frombuffer(bytes.fromhex(fact["fill"]), dtype=cells.dtype)[0])
    out[np.arange(width) < lengths[:, None]] = cells
    return out


def _fact(x: Tensor, inner: Sequence[int]) -> dict[str, Any]:
    return {"dtype": str(x.dtype).removeprefix("torch."), "inner": list(inner)}


def _numpy(x: Tensor) -> Any:
    return np.ascontiguousarray(x.detach().cpu().to(_WIDENED.get(x.dtype, x.dtype)).numpy())


def _tensor(array: Any, fact: dict[str, Any]) -> Tensor:
    return torch.from_numpy(np.array(array)).to(getattr(torch, fact["dtype"]))


def _cells(array: Any) -> pa.Array:
    """One value per entry of the first axis: a number, or the flat list of the further axes."""
    if array.ndim == 1:
        return pa.array(array)
    count, size = array.shape[0], int(np.prod(array.shape[1:]))
    return _lists(np.full(count, size), pa.array(array.reshape(-1)))


def _values(cells: pa.Array, fact: dict[str, Any]) -> Any:
    """The inverse of `_cells`."""
    count = len(cells)
    flat = cells.flatten() if fact["inner"] else cells
    return flat.to_numpy(zero_copy_only=False).reshape(count, *fact["inner"])


def _lists(sizes: Any, flat: pa.Array) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


# ---- spans, signals, meta: each a struct column with one field per name ------------------------------------------


def _struct(encoded: Mapping[str, tuple[pa.Array | None, dict[str, Any]]]) -> tuple[pa.Array | None, dict[str, Any]]:
    columns = {name: column for name, (column, _) in encoded.items() if column is not None}
    made = pa.StructArray.from_arrays(list(columns.values()), names=list(columns)) if columns else None
    return made, {name: fact for name, (_, fact) in encoded.items()}


def _entries(table: pa.Table, facts: dict[str, Any], kind: str) -> list[tuple[str, tuple[Any, dict[str, Any]]]]:
    columns: dict[str, pa.Array] = {}
    if kind in table.column_names:
        struct = table[kind].combine_chunks()
        columns = dict(zip((f.name for f in struct.type), struct.flatten(), strict=True))
    return [(name, (columns.get(name), fact)) for name, fact in facts[kind].items()]


def _put_credit(columns: dict[str, Any], facts: dict[str, Any], credit: Credit, rollouts: Rollouts) -> None:
    for column, field in _CREDIT.items():
        _put(columns, facts["tensors"], column, getattr(credit, field), rollouts)
    columns["parts"], facts["parts"] = _struct({k: _encode(v, rollouts) for k, v in credit.parts.items()})
    facts["notes"] = {k: float(v) for k, v in credit.notes.items()}


def _encode_spans(spans: Spans, rollouts: Rollouts) -> tuple[pa.Array, dict[str, Any]]:
    order, sizes = _by_row(spans, rollouts)
    given = {f.name: getattr(spans, f.name) for f in fields(spans) if getattr(spans, f.name) is not None}
    dtypes = {name: _fact(x, ())["dtype"] for name, x in given.items()}
    kept = {name: pa.array(_numpy(x)[order]) for name, x in given.items() if name != "row"}
    struct = pa.StructArray.from_arrays([pa.array(order), *kept.values()], names=["id", *kept])
    return _lists(sizes, struct), {"dtypes": dtypes}


def _decode_spans(column: pa.Array, fact: dict[str, Any]) -> Spans:
    struct = column.flatten()
    arrays = {f.name: x.to_numpy(zero_copy_only=False) for f, x in zip(struct.type, struct.flatten(), strict=True)}
    arrays["row"] = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy(zero_copy_only=False))
    order = np.argsort(arrays.pop("id"))
    return Spans(**{k: _tensor(arrays[k][order], {"dtype": dtype}) for k, dtype in fact["dtypes"].items()})


def _by_row(spans: Spans, rollouts: Rollouts) -> tuple[Any, Any]:
    """The spans' numbers sorted by row, and how many each row has."""
    row = spans.row.cpu().numpy()
    return np.argsort(row, kind="stable"), np.bincount(row, minlength=rollouts.batch)


def _encode(signal: Signal, rollouts: Rollouts) -> tuple[pa.Array | None, dict[str, Any]]:
    values = signal.values.detach().cpu()
    named = {"unit": signal.unit, "axes": list(signal.axes)}
    if signal.unit == "token":
        column, fact = _per_position(values, rollouts.lengths)
    elif signal.unit == "batch":  # one value for the whole table: it lives in the facts
        column, fact = None, {**_fact(values, values.shape[1:]), "bytes": _numpy(values).tobytes().hex()}
    elif signal.unit in ("group", "trajectory"):
        ids = rollouts.group_ids if signal.unit == "group" else rollouts.trajectory_ids
        column, fact = _per_row(values[ids])
    else:
        order, sizes = _by_row(rollouts.spans[signal.unit], rollouts)
        cells, fact = _per_row(values[torch.from_numpy(order)])
        column = _lists(sizes, cells)
    return column, {**named, **fact}


def _decode(column: pa.Array | None, fact: dict[str, Any], rollouts: Rollouts) -> Signal:
    unit = fact["unit"]
    if column is None:
        storage = _numpy(torch.empty(0, dtype=getattr(torch, fact["dtype"]))).dtype
        array = np.frombuffer(bytes.fromhex(fact["bytes"]), dtype=storage).reshape(1, *fact["inner"])
    elif unit == "token":
        array = _padded(column, fact, rollouts.lengths.numpy(), rollouts.width)
    elif unit in ("group", "trajectory"):
        ids = rollouts.group_ids if unit == "group" else rollouts.trajectory_ids
        array = _values(column, fact)[np.unique(ids.numpy(), return_index=True)[1]]
    else:
        order, _ = _by_row(rollouts.spans[unit], rollouts)
        array = _values(column.flatten(), fact)[np.argsort(order)]
    return Signal(_tensor(array, fact), unit, tuple(fact["axes"]))


def _encode_meta(name: str, column: Sequence[Any]) -> tuple[pa.Array, dict[str, Any]]:
    """Text, lists of text, integers and floats as they are; everything else as JSON text."""
    column = list(column)
    types: dict[str, Any] = {
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "int": pa.int64(),
        "float": pa.float64(),
    }
    kind = _kind(column)
    if kind != "json":
        return pa.array(column, type=types[kind]), {"kind": kind}
    try:
        return pa.array([json.dumps(x) for x in column], type=pa.string()), {"kind": "json"}
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"meta[{name!r}] cannot be recorded: {error}. Keep text, numbers, lists and dicts there."
        ) from None


def _kind(column: list[Any]) -> str:
    if not column:
        return "json"
    if all(_is_text(x) for x in column):
        return "text"
    if all(type(x) is list and all(_is_text(y) for y in x) for x in column):
        return "texts"
    if all(type(x) is int and -(2**63) <= x < 2**63 for x in column):
        return "int"
    return "float" if all(type(x) is float for x in column) else "json"


def _is_text(x: Any) -> bool:
    return type(x) is str and not any("\ud800" <= c <= "\udfff" for c in x)  # lone surrogates have no UTF-8


def _decode_meta(column: pa.Array, fact: dict[str, Any]) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return [json.loads(x) for x in values] if fact["kind"] == "json" else values

"""Rows from a file, a folder, the Hugging Face hub or memory, each with the place it came from for messages."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from apportion.tasks._names import nearest

Row = tuple[Mapping[str, Any], str]
"""A row's columns, and where it stands: `train.jsonl line 3`, or `train.parquet[2]`, which counts from 0."""
Source = str | Path | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]
"""A path or a hub name, or rows, or splits of rows: lists of dicts, a `Dataset`, a `DatasetDict`."""
WHOLE = "all"
"""The split of what has no splits."""
_HELD_OUT = ("test", "validation")
_SPLIT = re.compile(r"(train|test|validation)(-\d+-of-\d+)?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def train_and_test(
    source: Source, test: Source | None = None, *, split: str | None = None, config: str | None = None
) -> dict[str, list[Row]]:
    """The rows of "train" and "test"; or all of them as "all", where nobody has divided them.

    Args:
        source: where the rows are. Its split `split`, or "train", or all of it, is the training.
        test: where the test rows are: a split of `source`, or another source, of which the split "test" or else
            everything counts. Without it, the split "test" of `source`, or else "validation".
        split: see `source`. config: which configuration, on the hub.

    Raises:
        ValueError: a place is not there or cannot be read (file and line are named), or it has no such split.
    """
    splits = _splits(source, config)
    if split is not None and split not in splits:
        raise ValueError(f"{_named(source)} has no split {split!r}.{nearest(split, splits)}")
    if isinstance(test, str) and test in splits:
        held = splits.pop(test) if test != split else splits[test]
    elif test is not None:
        others = _splits(test, config)
        held = others["test"] if "test" in others else _all(others)
    elif split is not None or "train" in splits:
        held = next((splits[name] for name in _HELD_OUT if name in splits), [])
    else:
        return {WHOLE: _all(splits)}
    learn = splits.get(split or "train")
    learn = _all(splits) if learn is None else learn
    return {"train": learn, "test": held} if held or test is not None else {WHOLE: learn}


def on_hub(path: Source) -> bool:
    """Whether this is a hub name rather than a path."""
    if not isinstance(path, str) or Path(path).suffix in _READERS:
        return False
    return _HUB_NAME.fullmatch(path) is not None and not Path(path).expanduser().exists()


def _named(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def _all(splits: Mapping[str, list[Row]]) -> list[Row]:
    return [row for rows in splits.values() for row in rows]


def _splits(source: Source, config: str | None) -> dict[str, list[Row]]:
    """The rows of each named split, or of "all"."""
    if isinstance(source, Mapping):
        return {name: list(_numbered(rows, str(name))) for name, rows in source.items()}
    if not isinstance(source, str | Path):
        return {WHOLE: list(_numbered(source, "rows"))}
    place = Path(source).expanduser()
    if place.is_dir():
        return _from_folder(place)
    if place.exists():
        return {WHOLE: list(_from_file(place))}
    if on_hub(source):
        return _from_hub(str(source), config)
    raise ValueError(
        f"there is no file {source}. Give a file ({', '.join(_READERS)}), a folder with some, or a hub name such as openai/gsm8k."
    )


def _from_folder(place: Path) -> dict[str, list[Row]]:
    """A folder written by `save_to_disk`; or files named train, test, validation, or their parts; or any files."""
    if any((place / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return _from_disk(place)
    files = sorted(f for f in place.iterdir() if f.suffix in _READERS)
    if not files:
        raise ValueError(
            f"the folder {place} has no file that ends in {', '.join(_READERS)}. Give another folder or a file."
        )
    splits: dict[str, list[Row]] = {}
    for file in files:
        part = _SPLIT.fullmatch(file.stem)
        if part:
            splits.setdefault(part[1], []).extend(_from_file(file))
    return splits if "train" in splits else {WHOLE: [row for f in files for row in _from_file(f)]}


def _from_file(file: Path) -> Iterator[Row]:
    if file.suffix not in _READERS:
        raise ValueError(f"cannot read {file}: its name must end in {', '.join(_READERS)}.")
    for values, where in _READERS[file.suffix](file):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} needs an object with a value per column; got {type(values).__name__}.")
        yield values, where


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                yield _json_of(line, f"{file} line {n}"), f"{file} line {n}"


def _json(file: Path) -> Iterator[Row]:
    """A list of objects, or an object a line: both are published under this ending."""
    data = file.read_bytes()
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _jsonl(file)
    return ((row, f"{file}[{n}]") for n, row in enumerate(_json_of(data, str(file))))


def _json_of(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}. Repair or remove it.") from None


def _csv(file: Path) -> Iterator[Row]:
    """Every value is text: `007` stays what it is."""
    with file.open(newline="", encoding="utf-8-sig") as f:
        rows = csv.DictReader(f, strict=True)
        try:
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(f"two columns have one name in {', '.join(names)}")
            for row in rows:
                given = len(names) - list(row.values()).count(None) + len(row.pop(None, ()))  # type: ignore[call-overload]
                if given != len(names):
                    raise ValueError(f"there are {given} values for {len(names)} columns")
                yield row, f"{file} line {rows.line_num}"
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{file} line {max(rows.line_num, 1)} is not CSV: {error}. Repair or remove it.") from None


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file that can be read: {error}") from None
    return ((row, f"{file}[{n}]") for n, row in enumerate(rows))


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}


# ---- the package datasets ---------------------------------------------------------------------------------------------


def _from_disk(place: Path) -> dict[str, list[Row]]:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ValueError(
            f"{place} was written by the package datasets, which reads it: pip install datasets."
        ) from error
    return _of_data_set(load_from_disk(str(place)), str(place))


def _from_hub(path: str, config: str | None) -> dict[str, list[Row]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{path} is a hub name, which needs the package datasets: pip install datasets.") from error
    try:
        found = load_dataset(path, config)
    except Exception as error:
        raise ValueError(
            f"could not load {path} from the hub: {type(error).__name__}: {error}. Check the name and the network, or give "
            "the path of a file."
        ) from error
    return _of_data_set(found, path)


def _of_data_set(found: Any, path: str) -> dict[str, list[Row]]:
    if not isinstance(found, Mapping):
        return {WHOLE: list(_numbered(found, path))}
    return {name: list(_numbered(rows, f"{path} {name}")) for name, rows in found.items()}


def _numbered(rows: Iterable[Any], name: str) -> Iterator[Row]:
    for n, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}[{n}] needs a mapping with a value per column; got {type(row).__name__}.")
        yield row, f"{name}[{n}]"

"""What the arena runs: cells, each one file of results, computed in any order, never twice."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch

from apportion.record._files import write_whole
from apportion.record._machine import processor

Result = dict[str, Any]


class Cell(Protocol):
    """One file of results. Picklable; `compute` depends on nothing but the cell and what the file already holds."""

    @property
    def path(self) -> str:
        """Where its file lies in the folder of results."""

    def todo(self, found: Result | None) -> bool:
        """Whether anything is left to compute, given what the file holds."""

    def compute(self, found: Result | None, folder: Path) -> Result:
        """The whole result, what was found included; `folder` is for work in progress."""


def run(
    folder: Path, cells: Sequence[Cell], *, workers: int | None = None, on_cell: Callable[[Cell], None] | None = None
) -> int:
    """Compute what is left of the cells, in processes of one thread each; how many were computed.

    A cell's file appears when it is finished, whole; a kill loses the cells that were under way and nothing else.

    Args:
        workers: processes; default: one per core.
        on_cell: called with every cell that has just been finished.
    """
    left = unfinished(folder, cells)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}. Leave it out for one per core.")
    workers = min(workers or os.cpu_count() or 1, max(len(left), 1))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)
    with pool:
        running = {pool.submit(_finish, cell, folder): cell for cell in left}
        try:
            for done in as_completed(running):
                done.result()
                if on_cell:
                    on_cell(running[done])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(left)


def unfinished(folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Those of which something is left to compute."""
    return [cell for cell in cells if cell.todo(_read(folder / cell.path))]


def _begin() -> None:
    """A worker has one thread, and does not outlive who started it."""
    torch.set_num_threads(1)
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _finish(cell: Cell, folder: Path) -> None:
    path = folder / cell.path
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    result = {**cell.compute(_read(path), folder), **_environment(), "cpu_seconds": time.process_time() - begun}
    write_whole(path, dumped(result).encode())


def _read(path: Path) -> Result | None:
    """What a file of results holds; None = there is none yet."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a result of the arena: {error}. Delete it and run the arena again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a result of the arena: no JSON object. Delete it and run the arena again.")
    return found


def load(folder: Path) -> list[Result]:
    """Every finished cell of a folder."""
    return [found for path in sorted(folder.glob("*/**/*.json")) if (found := _read(path)) is not None]


def dumped(result: Result) -> str:
    """JSON with a line per entry of the second level, numbers of three digits; NaN is null, infinity the text "inf"."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(_plain(v))}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(_plain(value))}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float):
        return None if math.isnan(x) else ("inf" if x > 0 else "-inf") if math.isinf(x) else float(f"{x:.3g}")
    return x


def _environment() -> Result:
    """On which machine, with which versions and when."""
    versions = {name: metadata.version(name) for name in ("apportion", "torch")}
    made = {"machine": f"{processor()}, {os.cpu_count()} cores", "python": platform.python_version()}
    return {**versions, **made, "finished": datetime.now(UTC).isoformat(timespec="seconds")}

"""A run on disk: RUN/run.json, RUN/metrics.jsonl and RUN/rollouts/step-000012.parquet."""

import json
import math
import os
import platform
import re
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from apportion.record._files import write_synced, write_whole
from apportion.types import Credit, Rollouts

_PACKAGES = ("apportion", "torch", "transformers", "peft", "numpy", "pyarrow", "math-verify", "reasoning-gym", "openai")
_STEP = re.compile(r"step-(\d+)\.parquet")
_PROBE_BYTES = 1 << 20


class RunWriter:
    """Writes a run so that a kill at any moment leaves a folder that can be read and resumed.

    Files appear whole (written beside their place, synced, renamed); metrics are appended one line at a time.
    Make one with `create` or `resume`.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: str | Path, info: dict[str, Any]) -> "RunWriter":
        """Start a run in a new or empty folder.

        Args:
            path: the run folder.
            info: what run.json says; the keys the commands read are "credit" (printed composition), "config" (a dict)
                and "seed". The command line, versions and time are added.

        Raises:
            OSError: the folder is not empty, is a file, is read-only, or the disk is full.
        """
        path = Path(path)
        _make_folder(path)
        _probe(path)
        (path / "rollouts").mkdir()
        write_whole(path / "run.json", json.dumps({**_environment(), **_plain(info)}, indent=2).encode() + b"\n")
        return cls(path)

    @classmethod
    def resume(cls, path: str | Path) -> "RunWriter":
        """Go on writing a run that was interrupted; steps that are done again replace what was there."""
        path = Path(path)
        Run(path)
        _probe(path)
        (path / "rollouts").mkdir(exist_ok=True)
        for left_over in [*path.glob("*.tmp"), *(path / "rollouts").glob("*.tmp")]:
            left_over.unlink()
        _mend(path / "metrics.jsonl")
        return cls(path)

    def append(self, step: int, rollouts: Rollouts, credit: Credit | None = None) -> Path:
        """Record one step's rollouts and the credit they were given; a second call for a step replaces the first."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from apportion.record._table import to_table

        sink = pa.BufferOutputStream()
        pq.write_table(to_table(step, rollouts, credit), sink, compression="zstd")
        path = self.path / "rollouts" / f"step-{step:06d}.parquet"
        write_whole(path, sink.getvalue())
        return path

    def metrics(self, step: int, kind: str, **numbers: Any) -> None:
        """Append one line of numbers (or lists of them). What is not finite is written as null."""
        line = json.dumps({"step": step, "kind": kind, **_plain(numbers)}) + "\n"
        with open(self.path / "metrics.jsonl", "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


class Run:
    """Reads a recorded run, finished or still being written.

    Raises:
        FileNotFoundError: the folder has no run.json.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "run.json").is_file():
            what = "it has no run.json" if self.path.is_dir() else "there is no such folder"
            raise FileNotFoundError(f"{self.path} is not a recorded run: {what}. Give the folder that train wrote.")
        try:
            self.info: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        except ValueError as error:
            raise ValueError(f"{self.path / 'run.json'} is not JSON: {error}.") from None

    def steps(self) -> list[int]:
        """The steps whose rollouts are recorded, ascending."""
        names = (_STEP.fullmatch(p.name) for p in (self.path / "rollouts").glob("step-*.parquet"))
        return sorted(int(m[1]) for m in names if m)

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The metrics lines by step, of one kind or of all; where a step was done twice, the last counts."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        last: dict[tuple[int, str], dict[str, Any]] = {}
        for number, line in enumerate(lines, 1):
            if line and (entry := _parsed(path, number, line, final=number == len(lines))):
                last[entry["step"], entry["kind"]] = entry
        return [last[key] for key in sorted(last) if kind in (None, key[1])]

    def rollouts(self, step: int) -> Rollouts:
        """What was sampled and measured at a step, bit for bit as it was used."""
        from apportion.record._table import rollouts_from

        return rollouts_from(self._table(step))

    def credit(self, step: int) -> Credit:
        """The credit that was used at a step, bit for bit."""
        from apportion.record._table import credit_from

        credit = credit_from(self._table(step))
        if credit is None:
            raise ValueError(f"step {step} of {self.path} was recorded without credit. Compute it: apportion credit.")
        return credit

    def has_credit(self, step: int) -> bool:
        """Was the step recorded with its credit?"""
        return "advantages" in self._file(step).schema_arrow.names

    def _table(self, step: int) -> Any:
        return self._file(step).read()

    def _file(self, step: int) -> Any:
        import pyarrow.parquet as pq

        path = self.path / "rollouts" / f"step-{step:06d}.parquet"
        if not path.exists():
            steps = self.steps()
            known = f"recorded are {steps[0]} to {steps[-1]}" if steps else "none is recorded yet"
            raise ValueError(f"{self.path} has no rollouts of step {step}; {known}.")
        return pq.ParquetFile(path)


# ---- files ------------------------------------------------------------------------------------------------------------


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"{path} cannot be a run folder: a file is in the way. Choose another folder."
        ) from None
    except OSError as error:
        raise OSError(f"{path} cannot be created: {error.strerror}. Choose a folder you can write to.") from None
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty. Choose a new folder for the run, or resume the run that is there.")


def _probe(path: Path) -> None:
    """Really write a little: permissions do not tell about full disks, quotas or read-only mounts."""
    probe = path / "probe.tmp"
    try:
        write_synced(probe, bytes(_PROBE_BYTES))
    except OSError as error:
        raise OSError(
            f"{path} cannot be written to: {error.strerror}. Free some space, or choose a folder on another disk."
        ) from None
    finally:
        with suppress(OSError):
            probe.unlink()


def _mend(path: Path) -> None:
    """Cut a last line that a kill left half-written."""
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return
    whole = data.rfind(b"\n") + 1
    with open(path, "r+b") as file:
        if _is_json(data[whole:]):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(whole)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parsed(path: Path, number: int, line: bytes, *, final: bool) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError as error:
        if final:
            return None
        raise ValueError(f"{path} line {number} is not JSON: {error}. Delete that line, or restore the file.") from None
    if not isinstance(entry, dict) or "step" not in entry or "kind" not in entry:
        raise ValueError(f'{path} line {number} needs the keys "step" and "kind".')
    return entry


# ---- what run.json and the metrics say ----------------------------------------------------------------------------


def _environment() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": 1, "created": now, "command": sys.argv, "versions": versions}


def _plain(value: Any) -> Any:
    """JSON without NaN and infinities: they become null; tensors and NumPy numbers become plain ones."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)

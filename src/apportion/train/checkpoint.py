"""Checkpoints: one file each, written beside the old one and renamed, so that a kill leaves the old or the new."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(folder: Path, done: int, state: dict[str, Any]) -> None:
    """Write `state` as the checkpoint after `done` steps (warm-up included), then remove older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"done-{done:06d}.pt"
    staging = target.with_suffix(".tmp")
    with staging.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(target)
    _sync(folder)
    for old in _checkpoints(folder)[:-1]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint, or None. Half-written files have another name and are removed."""
    if not folder.is_dir():
        return None
    for staging in folder.glob("*.tmp"):
        staging.unlink()
    found = _checkpoints(folder)
    return torch.load(found[-1], weights_only=True, mmap=True) if found else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("done-*.pt"))


def _sync(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that a kill leaves whole."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: Any) -> None:
    """The file is either what it was or all of `data`, also after a kill or a power cut."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write_synced(beside, data)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_synced(path: Path, data: Any) -> None:
    """Write bytes and wait until they are on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

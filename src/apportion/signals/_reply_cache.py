"""Replies on disk, one small file each, so that a run that is resumed or repeated does not ask again."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 4 << 20
"""A larger entry is ignored."""


@dataclass(frozen=True)
class ReplyCache:
    """A folder of replies by the hash of everything that was asked.

    An entry is written to a temporary file and renamed, so a killed process leaves no half entry. An entry that cannot
    be read, is too large or is not what was written here counts as absent.
    """

    folder: Path

    @staticmethod
    def key(request: Mapping[str, Any], critique: int) -> str:
        """The hash of model, prompt, sampling settings and the number of the critique."""
        text = json.dumps({"request": request, "critique": critique}, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str) -> str | None:
        """The reply, or None."""
        path = self._path(key)
        try:
            if not path.is_file() or path.stat().st_size > MAX_BYTES:
                return None
            entry = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.get("key") != key or not isinstance(entry.get("reply"), str):
            return None
        return str(entry["reply"])

    def put(self, key: str, reply: str) -> None:
        """Keep a reply.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, "reply": reply}, file)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

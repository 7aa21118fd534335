"""What the tests of the arena's runner give to its processes, which must be able to import it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from apportion import grpo
from apportion.arena._cells import run


def resolve(name: str):
    if name == "mine":
        return grpo(eps=0.5)
    raise ValueError(f"no method {name}")


@dataclass(frozen=True)
class Slow:
    """A cell that takes long, unless it is the first."""

    number: int

    @property
    def path(self) -> str:
        return f"slow/{self.number}.json"

    def todo(self, found) -> bool:
        return found is None

    def compute(self, found, folder) -> dict:
        if self.number:
            (folder / "pid").write_text(str(os.getpid()))
            time.sleep(60)
        return {"number": self.number}


def run_slow(folder: Path) -> None:
    run(folder, [Slow(0), Slow(1)], workers=1)

"""The function that `symbolic_answer` calls in a process of its own; it imports nothing of this package."""

from math_verify import parse, verify


def agrees(text: str, gold: str) -> float | None:
    """1 if the last mathematical answer in the text equals the gold one, else 0; None if the gold one is unreadable."""
    target = _read(f"${gold}$") or _read(gold)
    if not target:
        return None
    return float(verify(target, _read(text), timeout_seconds=None))


def _read(text: str) -> list[object]:
    return list(parse(text, parsing_timeout=None))

"""Which errors are the user's and get one line, and which are ours and keep their traceback."""

import dis
from collections.abc import Iterable
from difflib import get_close_matches

_EXTRAS = {
    "transformers": "train",
    "peft": "train",
    "math_verify": "train",
    "reasoning_gym": "tasks",
    "gguf": "train",
    "tensorboard": "train",
    "openai": "judge",
    "duckdb": "view",
    "fastapi": "view",
    "uvicorn": "view",
    "trl": "trl",
}


class UserError(Exception):
    """A mistake in the call; its text says what is needed, what was got and the cure."""


def one_line(error: Exception) -> str | None:
    """The line that tells a user their mistake; None if the error is a bug, whose traceback is worth more.

    A mistake is: a `UserError`; a file or disk that refuses; a package of an extra that is not installed; and a
    ValueError or TypeError that a `raise` statement of this library raised on purpose. The same types raised by the
    interpreter, by torch or by the user's own code are bugs.
    """
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package)
        return f"this needs the package {package}. Install it: pip install 'apportion[{extra}]'" if extra else None
    if isinstance(error, UserError | OSError) or (isinstance(error, ValueError | TypeError) and _on_purpose(error)):
        return " ".join(str(error).split())
    return None


def _on_purpose(error: Exception) -> bool:
    """Did a `raise` statement inside apportion raise it?"""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    ours = str(frame.f_globals.get("__name__", "")).partition(".")[0] == "apportion"
    return ours and dis.opname[frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def nearest(wrong: str, right: Iterable[str]) -> str:
    """`Did you mean ...?`, or the whole list where nothing is near."""
    right = list(right)
    close = get_close_matches(wrong, right, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"There is: {', '.join(right)}."

"""From a name that a person wrote to the thing, or to a hint at the name that was meant."""

import importlib
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_OWN = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest right name, or the list of names if none is near."""
    known = list(known)
    return meant(name, known) or f" Known: {', '.join(sorted(known))}."


def meant(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest right name, or nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def is_own(text: str) -> bool:
    """Whether a text has the form `module:name`."""
    return _OWN.fullmatch(text.strip()) is not None


def imported(text: str, use: str) -> Any:
    """What `module:name` names; `use` says in messages what it is for.

    Raises:
        ValueError: the module cannot be found, or has no such name (answered with the nearest known one).
    """
    module, _, name = text.strip().partition(":")
    try:
        source = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot import {module} for the {use} {text}: {error}. Is it on the Python path?") from error
    if not hasattr(source, name):
        raise ValueError(
            f"the module {module} has no {name!r}.{nearest(name, [n for n in vars(source) if n[0] != '_'])}"
        )
    return getattr(source, name)

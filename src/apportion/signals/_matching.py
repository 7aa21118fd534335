"""The function that `matches` calls in a process of its own, because `re` cannot be interrupted; standard library only."""

import re


def found(pattern: str, text: str) -> bool:
    """Whether the pattern occurs in the text."""
    return re.search(pattern, text) is not None

"""Which characters each token wrote: one string per token, for any tokenizer with the interface of transformers."""

import codecs
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Protocol, runtime_checkable

_BROKEN = "\ufffd"
_WAIT = 16
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def decode(self, ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any:
        """The text of the ids."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The vocabulary entries of the ids."""


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """One string per token; joined they are the decoded ids, special tokens as their literal text.

    A character whose bytes are spread over several tokens belongs to the token that completes it; the tokens before it
    get "". Bytes that form no character are U+FFFD, as in `decode`. Linear in the number of tokens.

    Args:
        tokenizer: `decode` and `convert_ids_to_tokens` as in transformers (`clean_up_tokenization_spaces` is off).
        ids: token ids of one row, without padding.
    """
    ids = [int(i) for i in ids]
    if not ids:
        return []
    whole = _decode(tokenizer, ids)
    for pieces in (_byte_level(tokenizer, ids), _by_windows(tokenizer, ids)):
        if "".join(pieces) == whole:
            return pieces
    return _by_windows(tokenizer, ids, _inside_bytes(tokenizer, ids))


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _byte_level(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Right if the vocabulary is byte-level (GPT-2, Llama 3, Qwen, SmolLM); the caller compares with `decode`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(_bytes(token)) for token in tokenizer.convert_ids_to_tokens(list(ids))]
    pieces[-1] += decoder.decode(b"", True)
    return pieces


@lru_cache(maxsize=1 << 18)
def _bytes(token: str | None) -> bytes:
    """The bytes that a byte-level vocabulary entry stands for; an added token is literal text."""
    table = _byte_table()
    if token is None:  # an id beyond the vocabulary, which decode leaves out
        return b""
    if all(c in table for c in token):
        return bytes(table[c] for c in token)
    return token.encode("utf-8", "replace")


@cache
def _byte_table() -> dict[str, int]:
    """The printable stand-in of each byte: itself if printable, else the next free code point from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _by_windows(tokenizer: Tokenizer, ids: Sequence[int], inside: Sequence[bool] = ()) -> list[str]:
    """Any tokenizer: decode each token after the ones just before it, wait while the last character is incomplete.

    After `_WAIT` tokens of waiting only a token that is whole by itself is worth a look, which keeps the time linear.
    Nothing is cut after a token for which `inside` is True.
    """
    pieces = [""] * len(ids)
    context = done = 0
    for i in range(len(ids)):
        last = i + 1 == len(ids)
        if (inside and inside[i]) or (i - done >= _WAIT and not last and _BROKEN in _decode(tokenizer, [ids[i]])):
            continue
        text = _decode(tokenizer, ids[context : i + 1])
        if text.endswith(_BROKEN) and not last and not inside:
            continue
        pieces[i] = text[len(_decode(tokenizer, ids[context:done])) :]
        context, done = done, i + 1
    return pieces


def _inside_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """Tokens followed by another byte where both are `<0xE2>` and the like.

    SentencePiece decodes such a run as a whole: one bad byte spoils all of it, so it cannot be cut into characters.
    """
    byte = [bool(_BYTE.fullmatch(t or "")) for t in tokenizer.convert_ids_to_tokens(list(ids))]
    return [a and b for a, b in zip(byte, [*byte[1:], False], strict=True)]

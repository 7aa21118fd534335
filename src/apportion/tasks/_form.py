"""Which columns of a row are the prompt, the answer and the solution, and how the prompt is put together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.tasks._answers import gold
from apportion.tasks._core import Message, Problem, problem_id
from apportion.tasks._names import meant
from apportion.tasks._rows import Row

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_ABSENT = object()


@dataclass(frozen=True)
class Form:
    """How a row becomes a problem; the fields are arguments of `from_data`."""

    prompt: str
    answer: str | None
    solution: str | None
    verify: Any
    chat: bool
    system: str
    template: str
    name: str

    @property
    def places(self) -> list[str]:
        """The columns that the template shows, each once, in its order."""
        return list(dict.fromkeys(m[1] for m in _PLACE.finditer(self.template) if m[1]))

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse columns that no row has, and a template that asks every time the same."""
        if self.template and not self.places:
            raise ValueError(
                f"template needs a place such as {{{self.prompt}}}, or every prompt is the same; got {self.template!r}."
            )
        named = [("prompt", self.prompt), ("answer", self.answer), ("solution", self.solution)]
        for use, column in (*named, *(("template", place) for place in self.places)):
            if rows and column is not None and not any(_has(values, column) for values, _ in rows):
                columns = list(dict.fromkeys(key for values, _ in rows for key in values))
                braces = " Braces that are no place are written {{ and }}." if use == "template" else ""
                raise ValueError(
                    f"{_source(rows)} has no column {column!r} for {use}.{meant(column, columns)} "
                    f"Its columns: {', '.join(columns)}.{braces}"
                )

    def problem(self, row: Row) -> Problem:
        """The problem in a row."""
        values, where = row
        before, last = self._messages(row)
        text, shown = last["content"], [last["content"]]
        if self.template:
            filled = {p: text if p == self.prompt else _shown(_value(row, p)) for p in self.places}
            text, shown = _PLACE.sub(lambda m: filled[m[1]] if m[1] else m[0][0], self.template), list(filled.values())
        asked = "\n".join([*(m["content"] for m in before if m["role"] != "system"), *shown]).strip()
        try:
            asked.encode()
        except UnicodeEncodeError as error:  # JSON may write half of a character, which no tokenizer takes
            raise ValueError(f"{where} holds text that is not Unicode: {error}. Correct it.") from None
        if self.system:
            before = [{"role": "system", "content": self.system}, *(m for m in before if m["role"] != "system")]
        named = {self.prompt, self.answer, self.solution}
        return Problem(
            id=problem_id(self.name, asked),
            question=asked,
            prompt=[*before, {**last, "content": text}] if self.chat else text,
            answer="" if self.answer is None else gold(self.verify, _value(row, self.answer), where),
            solution=None if self.solution is None else _text(_value(row, self.solution), where, self.solution),
            data={key: value for key, value in values.items() if key not in named},
        )

    def _messages(self, row: Row) -> tuple[list[Message], Message]:
        """The messages before the last, and the last; text is one message of the user."""
        content, where = _value(row, self.prompt), row[1]
        if isinstance(content, str) and content.strip():
            return [], {"role": "user", "content": content}
        given = f"{where} column {self.prompt!r}"
        if not isinstance(content, list | tuple) or not content:
            raise ValueError(
                f"{given} needs text or a list of chat messages; got {content!r}. Correct it, or leave it out with keep."
            )
        if not self.chat:
            raise ValueError(f"{given} holds chat messages, but chat=False. Give chat=True, or a column of text.")
        for message in content:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise ValueError(f"{given} needs messages with role and content as text; got {message!r}.")
        if content[-1]["role"] == "assistant" or not content[-1]["content"].strip():
            raise ValueError(f"{given} must end with what the policy answers; its last message is {content[-1]!r}.")
        return [dict(m) for m in content[:-1]], dict(content[-1])


def _has(values: Mapping[str, Any], column: str) -> bool:
    return _found(values, column) is not _ABSENT


def _found(values: Any, column: str) -> Any:
    """The value of a column, or within it, as in `reward_model.ground_truth`."""
    if not isinstance(values, Mapping):
        return _ABSENT
    if column in values:
        return values[column]
    first, dot, rest = column.partition(".")
    return _found(values.get(first), rest) if dot else _ABSENT


def _value(row: Row, column: str) -> Any:
    value = _found(row[0], column)
    if value is _ABSENT or value is None:
        raise ValueError(f"{row[1]} has no value in column {column!r}. Give one, or leave the row out with keep.")
    return value


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} column {column!r} needs text; got {value!r}.")
    return value


def _shown(value: Any) -> str:
    """A value as a template shows it; a list, or {"label": [...], "text": [...]}, as lettered lines."""
    if isinstance(value, Mapping) and {"label", "text"} <= set(value):
        return "\n".join(f"{label}. {text}" for label, text in zip(value["label"], value["text"], strict=True))
    if isinstance(value, list | tuple):
        return "\n".join(f"{chr(ord('A') + n)}. {text}" for n, text in enumerate(value))
    return str(value)


def _source(rows: Sequence[Row]) -> str:
    """The place of the first row without its line."""
    return re.sub(r"( line \d+|\[\d+\])$", "", rows[0][1])

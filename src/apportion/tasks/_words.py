"""Word problems in the three schemas that GSM8K, SVAMP and MAWPS are published in."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apportion.signals import lines, tool_judge
from apportion.tasks._answers import gold, number
from apportion.tasks._core import BasicTask, Problem, problem_id
from apportion.tasks._divide import NearDuplicates, divide
from apportion.tasks._overlap import SIMILARITY
from apportion.tasks._rows import on_hub, train_and_test

INSTRUCTION = 'Solve the problem step by step, one step a line. End with "#### " and the number.'
_MARK = re.compile(r"<<([^<>]*)>>")


def word_problems(
    path: str,
    test: str | None = None,
    *,
    name: str = "word_problems",
    config: str | None = None,
    test_share: float = 0.2,
    instruction: str = INSTRUCTION,
    chat: bool = True,
    near_duplicates: NearDuplicates = "report",
) -> BasicTask:
    """Word problems whose answer is a number, in the schema of a published data set. For other columns: `from_data`.

    | schema | a row                               | also taken from it                                               |
    |--------|-------------------------------------|------------------------------------------------------------------|
    | GSM8K  | `question`, `answer` with `#### 18` | the worked solution without its marks; the marks as `equations`  |
    | SVAMP  | `Body`, `Question`, `Answer`        | `Equation` as `equations`                                        |
    | MAWPS  | `input`, `target`                   |                                                                  |

    A response is right if its number (see `read_number`) lies within 0.0001 of the answer. Of questions that repeat
    within a file the first is kept.

    Args:
        path: a file (JSONL, JSON, Parquet, CSV); a folder with files named train and test, or with any; or a hub name
            `owner/data`.
        test: where the test problems are: a split of `path`, or another place. Without it, the split test, or else
            validation, of `path`; where there is none, `test_share` of the questions, chosen by a hash of their text.
        name: what the record calls the task. config: which configuration, on the hub.
        test_share: see `test`. instruction: stands after the question. chat: prompts are chat messages; False = text.
        near_duplicates: training questions that resemble a test question: "report" (in `notes`), "drop" or "ignore".

    Raises:
        ValueError: a file does not exist; a line is broken (file and line are named); train and test share a question
            or one of them is empty; the hub cannot be reached.
    """
    rows = train_and_test(path, test, config=config)
    problems = {part: [_asked(_row(*row), name, instruction, chat) for row in found] for part, found in rows.items()}
    learn, held, notes = divide(problems, name, test_share=test_share, near=near_duplicates, similarity=SIMILARITY)
    return BasicTask(name, learn, held, number, lines(), tool_judge(), notes=notes)


def gsm8k(path: str = "openai/gsm8k", test: str | None = None, *, chat: bool = True) -> BasicTask:
    """Grade-school word problems with worked solutions.

    A file, a folder or a hub name: see `word_problems`.
    """
    return word_problems(path, test, name="gsm8k", config="main" if on_hub(path) else None, chat=chat)


def svamp(path: str = "ChilleD/SVAMP", test: str | None = None, *, chat: bool = True) -> BasicTask:
    """Elementary word problems, varied so that shallow patterns fail.

    A file, a folder or a hub name: see `word_problems`.
    """
    return word_problems(path, test, name="svamp", chat=chat)


def mawps(path: str, test: str | None = None, *, chat: bool = True) -> BasicTask:
    """Word problems of one or two steps.

    A file, a folder or a hub name: see `word_problems`.
    """
    return word_problems(path, test, name="mawps", chat=chat)


def _asked(problem: Problem, name: str, instruction: str, chat: bool) -> Problem:
    text = f"{problem.question}\n{instruction}"
    prompt: Any = [{"role": "user", "content": text}] if chat else f"{text}\n"
    return replace(problem, id=problem_id(name, problem.question), prompt=prompt)


# ---- the three schemas ------------------------------------------------------------------------------------------------


def _row(row: Mapping[str, Any], where: str) -> Problem:
    """The problem in a row of any of the three schemas."""
    keys = set(row)
    if {"question", "answer"} <= keys:
        return _gsm8k(row, where)
    if {"Body", "Question", "Answer"} <= keys:
        body = str(row["Body"]).strip()
        question = f"{body}{'' if body.endswith(('.', '!', '?', ',')) else '.'} {str(row['Question']).strip()}"
        return _problem(question, row["Answer"], where, equations=(str(row.get("Equation", "")),))
    if {"input", "target"} <= keys:
        return _problem(row["input"], row["target"], where)
    raise ValueError(
        f"{where} needs question and answer, or Body, Question and Answer, or input and target; got {', '.join(sorted(keys))}. "
        "from_data takes columns of other names."
    )


def _gsm8k(row: Mapping[str, Any], where: str) -> Problem:
    text = str(row["answer"])
    _, mark, answer = text.rpartition("####")
    if not mark:
        raise ValueError(f"{where} needs an answer that ends in '#### ' and a number; got {text[-40:]!r}.")
    problem = _problem(row["question"], answer, where, equations=tuple(_MARK.findall(text)))
    return replace(problem, solution=_MARK.sub("", text))


def _problem(question: Any, answer: Any, where: str, **data: Any) -> Problem:
    return Problem("", str(question).strip(), "", gold("number", answer, where), data=data)

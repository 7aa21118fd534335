"""Word problems from JSONL files, in the three schemas that GSM8K, SVAMP and MAWPS are published in."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from apportion.signals import lines, numeric_answer, read_number, tool_judge
from apportion.tasks._core import BasicTask, Problem, held_out, problem_id, question_key

INSTRUCTION = 'Solve the problem step by step, one step a line. End with "#### " and the number.'
TOLERANCE = 1e-4
"""Published answers such as 0.6666666667 are rounded."""
_MARK = re.compile(r"<<([^<>]*)>>")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def word_problems(
    path: str,
    test: str | None = None,
    *,
    name: str = "word_problems",
    config: str | None = None,
    test_share: float = 0.2,
    instruction: str = INSTRUCTION,
    chat: bool = True,
) -> BasicTask:
    """Word problems whose answer is a number, from JSONL files or from the Hugging Face hub.

    | schema | a line                              | also taken from it                                               |
    |--------|-------------------------------------|------------------------------------------------------------------|
    | GSM8K  | `question`, `answer` with `#### 18` | the worked solution without its marks; the marks as `equations`  |
    | SVAMP  | `Body`, `Question`, `Answer`        | `Equation` as `equations`                                        |
    | MAWPS  | `input`, `target`                   |                                                                  |

    A response is right if its number (see `read_number`) lies within 0.0001 of the answer. Of questions that repeat
    within a file the first is kept.

    Args:
        path: a file; a folder with `train.jsonl` and `test.jsonl`, or with any `*.jsonl`; or a hub name `owner/data`.
        test: where the test problems are; all of them count, and of `path` its `train` split if it has one. Without it (and without a `test` split) `test_share` of the questions,
            chosen by a hash of their text, are the test.
        name: what the record calls the task. config: which configuration, on the hub.
        test_share: see `test`. instruction: stands after the question. chat: prompts are chat messages; False = text.

    Raises:
        ValueError: a file does not exist; a line is broken (file and line are named); train and test share a question
            or one of them is empty; the hub cannot be reached.
    """
    splits = _splits(path, config)
    if test is not None:
        splits = {"train": splits.get("train") or _all(splits), "test": _all(_splits(test, config))}
    if "test" not in splits or "train" not in splits:
        every = _all(splits)
        splits = {
            "train": [p for p in every if not held_out(p.question, test_share)],
            "test": [p for p in every if held_out(p.question, test_share)],
        }
        _check_sizes(path, splits, test_share)
    learn, held = ([_asked(p, name, instruction, chat) for p in _distinct(splits[s])] for s in ("train", "test"))
    return BasicTask(name, learn, held, _verify, lines(), tool_judge())


def gsm8k(path: str = "openai/gsm8k", test: str | None = None, *, chat: bool = True) -> BasicTask:
    """Grade-school word problems with worked solutions.

    A file, a folder or a hub name: see `word_problems`.
    """
    return word_problems(path, test, name="gsm8k", config="main" if _on_hub(path) else None, chat=chat)


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


def _check_sizes(path: str, splits: Mapping[str, list[Problem]], share: float) -> None:
    learn, held = len(splits["train"]), len(splits["test"])
    if not learn or not held:
        raise ValueError(
            f"the {learn + held} problems of {path} split into {learn} for train and {held} for test (test_share={share}). "
            "Give more problems, a test file, or word_problems another test_share."
        )


def _verify(problem: Problem, text: str) -> float:
    return numeric_answer(text, problem.answer, tolerance=TOLERANCE)


def _asked(problem: Problem, name: str, instruction: str, chat: bool) -> Problem:
    text = f"{problem.question}\n{instruction}"
    prompt: Any = [{"role": "user", "content": text}] if chat else f"{text}\n"
    return replace(problem, id=problem_id(name, problem.question), prompt=prompt)


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(question_key(problem.question), problem)
    return list(first.values())


def _all(splits: Mapping[str, list[Problem]]) -> list[Problem]:
    return [problem for rows in splits.values() for problem in rows]


# ---- reading ----------------------------------------------------------------------------------------------------------


def _splits(path: str, config: str | None) -> dict[str, list[Problem]]:
    """The problems of each split: "train", "test", or "all" where no split is named."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.jsonl"))
        if not files:
            raise ValueError(f"the folder {path} has no *.jsonl file. Give a file, or a folder with one.")
        if {"train.jsonl", "test.jsonl"} <= {f.name for f in files}:
            return {s: _read(place / f"{s}.jsonl") for s in ("train", "test")}
        return {"all": [p for f in files for p in _read(f)]}
    if place.exists():
        return {"all": _read(place)}
    if _on_hub(path):
        return _from_hub(path, config)
    raise ValueError(
        f"there is no file {path}. Give a JSONL file, a folder with one, or a hub name such as openai/gsm8k."
    )


def _on_hub(path: str) -> bool:
    named = _HUB_NAME.fullmatch(path) is not None and not path.endswith((".json", ".jsonl"))
    return named and not Path(path).expanduser().exists()


def _read(file: Path) -> list[Problem]:
    with file.open("rb") as f:
        return [_line(line, f"{file} line {n}") for n, line in enumerate(f, 1) if line.strip()]


def _line(line: bytes, where: str) -> Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}. Repair the line or remove it.") from None
    return _row(row, where)


def _row(row: Any, where: str) -> Problem:
    """The problem in a row of any of the three schemas."""
    keys = set(row) if isinstance(row, Mapping) else set()
    if {"question", "answer"} <= keys:
        return _gsm8k(row, where)
    if {"Body", "Question", "Answer"} <= keys:
        body = str(row["Body"]).strip()
        question = f"{body}{'' if body.endswith(('.', '!', '?', ',')) else '.'} {str(row['Question']).strip()}"
        return _problem(question, row["Answer"], where, equations=(str(row.get("Equation", "")),))
    if {"input", "target"} <= keys:
        return _problem(row["input"], row["target"], where)
    got = ", ".join(sorted(keys)) if keys else type(row).__name__
    raise ValueError(
        f"{where} needs question and answer, or Body, Question and Answer, or input and target; got {got}."
    )


def _gsm8k(row: Mapping[str, Any], where: str) -> Problem:
    text = str(row["answer"])
    _, mark, answer = text.rpartition("####")
    if not mark:
        raise ValueError(f"{where} needs an answer that ends in '#### ' and a number; got {text[-40:]!r}.")
    problem = _problem(row["question"], answer, where, equations=tuple(_MARK.findall(text)))
    return replace(problem, solution=_MARK.sub("", text))


def _problem(question: Any, answer: Any, where: str, **data: Any) -> Problem:
    number = None if isinstance(answer, bool) or answer is None else read_number(str(answer))
    if number is None:
        raise ValueError(f"{where} needs a number as its answer; got {answer!r}.")
    return Problem(id="", question=str(question).strip(), prompt="", answer=_plain(number), data=data)


def _plain(number: Fraction) -> str:
    """145.0 as 145, 0.25 as 0.25."""
    return str(number) if number.denominator == 1 else str(float(number))


def _from_hub(path: str, config: str | None) -> dict[str, list[Problem]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{path} is a hub name, which needs the package datasets: pip install datasets.") from error
    try:
        splits = load_dataset(path, config)
    except Exception as error:
        raise ValueError(
            f"could not load {path} from the hub: {type(error).__name__}: {error}. Check the name and the network, or give "
            "the path of a JSONL file."
        ) from error
    return {name: [_row(row, f"{path} {name} row {n}") for n, row in enumerate(rows)] for name, rows in splits.items()}

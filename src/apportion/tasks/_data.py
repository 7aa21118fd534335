"""A task from the user's own data."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apportion.signals import lines, tool_judge
from apportion.tasks._answers import VERIFIERS, Verifier, chosen, verifier_of
from apportion.tasks._core import BasicTask, Message, Problem
from apportion.tasks._divide import NearDuplicates, divide
from apportion.tasks._form import Form
from apportion.tasks._names import imported, is_own
from apportion.tasks._overlap import SIMILARITY
from apportion.tasks._rows import Row, Source, train_and_test

_TRIED = 100
"""Gold answers that are tried before the run where trying takes a process."""
_JUDGED = ("number", "math")
_QUICK = ("number", "exact", "choice")
Keep = str | Callable[[Mapping[str, Any]], Any]


def from_data(
    path: Source,
    test: Source | None = None,
    *,
    prompt: str = "prompt",
    answer: str | None = "answer",
    solution: str | None = None,
    verify: str | Verifier | None = "number",
    verify_seconds: float = 10.0,
    chat: bool = True,
    system: str = "",
    template: str = "",
    keep: Keep | None = None,
    max_characters: int = 0,
    max_tokens: int = 0,
    tokenizer: Any = None,
    split: str | None = None,
    config: str | None = None,
    test_share: float = 0.2,
    near_duplicates: NearDuplicates = "report",
    similarity: float = SIMILARITY,
    name: str = "data",
) -> BasicTask:
    r"""Your own prompts: JSONL, JSON, Parquet or CSV files, or a Hugging Face data set.

    | verify            | a response is right if                                            | the answer column holds            |
    |-------------------|-------------------------------------------------------------------|------------------------------------|
    | "number"          | its number (`signals.read_number`) is within 0.0001               | a number, or text that ends in one |
    | "exact"           | its marked answer, or else all of it, is the same text            | text                               |
    | "math"            | math-verify finds it equal (`signals.symbolic_answer`)            | LaTeX or a number                  |
    | "choice"          | its marked answer, "answer is B" or first lone letter is the same | a letter, or a number with 0 = A   |
    | "module:function" | the function says so: `(problem, text) -> reward`                 | anything                           |
    | None              | nothing is verified: the reward is NaN                            | answer=None                        |

    Marked is what follows the last `####`, or stands in `\boxed{}` or `<answer></answer>`. A function given as text runs in
    a process that is killed after `verify_seconds`; there the problem is a plain object with the fields of `Problem`. A
    function that raises, or takes too long, stops the run, or the response is left out, as the run's `unmeasured` says. A
    function itself may be given in Python; it runs in this process.

    A name of a column may reach into it: `reward_model.ground_truth`. The columns that are not named go to
    `Problem.data`. What stands in the template's places, or else the prompt, is the question: questions that repeat are
    taken once, and none may be in both train and test. What was left out, and which training questions resemble a test
    question, is in `notes` of the task.

    Args:
        path: a file; a folder with files named train, test or validation, or with any files, or written by `save_to_disk`;
            a hub name `owner/data`; in Python also rows or splits of rows: lists of dicts, a `Dataset`, a `DatasetDict`.
        test: where the test rows are: a split of `path`, or another place. Without it, the split test, or else
            validation, of `path`; where there is none, `test_share` of the questions, chosen by a hash of their text.
        prompt: the column with text, or with chat messages that end before the answer.
        answer: the column with the gold answer; None = there is none. solution: that with a worked solution for a warm-up.
        verify, verify_seconds: see above.
        chat: the prompt becomes a chat message, for the model's chat template; False = the prompt is raw text.
        system: a system message in front, in place of one that the messages have.
        template: what the policy is asked, with a column's name in braces at each place: `{question}\n{choices}`. A list
            is shown as lettered lines. `{{` and `}}` stand for braces, `{}` for itself. With messages it replaces the
            text of the last one, and `{prompt}` of the column's name is that text. Empty = the prompt column.
        keep: which rows are used: a function of the row (a dict) or `module:function`.
        max_characters, max_tokens: longer prompts are left out; 0 = no limit. Tokens are those of the whole prompt,
            counted by `tokenizer`: a folder, a hub name, or in Python a tokenizer.
        split: which split of `path` is the training; None = "train", or everything. config: which configuration, on the hub.
        test_share: see `test`.
        near_duplicates: "report" notes training questions that resemble a test question, "drop" drops them (and those
            that are the same) from train, "ignore" does not look. similarity: from where on; see `near_duplicates`.
        name: what the record calls the task.

    Raises:
        ValueError: a place is not there, cannot be read or lacks a column (its columns are listed); a row is broken (file
            and line are named); train and test share a question or one of them is empty.

    Example:
        >>> rows = [{"q": f"{a} + {b}?", "a": a + b} for a in range(9) for b in range(9)]
        >>> task = from_data(rows, prompt="q", answer="a", template="{q} Answer with a number.", near_duplicates="ignore")
        >>> task.train[0].prompt, task.train[0].answer
        ([{'role': 'user', 'content': '0 + 0? Answer with a number.'}], '0')
    """
    if answer is None and isinstance(verify, str) and verify in VERIFIERS:
        raise ValueError(
            f"verify={verify!r} compares with a gold answer. Name its column (answer=), or give verify=None."
        )
    if system and not chat:
        raise ValueError("system is a chat message, but chat=False. Put it into template, or give chat=True.")
    verifier = verifier_of(verify, verify_seconds)
    form = Form(prompt, answer, solution, verify, chat, system, template, name)
    keeps, fits = _keeps(keep), _fits(max_characters, max_tokens, tokenizer)
    problems: dict[str, list[Problem]] = {}
    left_out = Counter[str]()
    for part, rows in train_and_test(path, test, split=split, config=config).items():
        form.check(rows)
        kept = [row for row in rows if keeps(row)]
        made = [form.problem(row) for row in kept]
        problems[part] = fits(made)
        left_out += Counter({"by keep": len(rows) - len(kept), "as too long": len(made) - len(problems[part])})
    learn, held, told = divide(problems, name, test_share=test_share, near=near_duplicates, similarity=similarity)
    notes = [f"{count} rows were left out {why}" for why, count in left_out.items()]
    notes += _checked([*learn, *held], verify, verifier)
    judge = tool_judge() if verify in _JUDGED else None
    answer_of = chosen if verify == "choice" else None
    return BasicTask(name, learn, held, verifier, lines(), judge, answer_of=answer_of, notes=(*notes, *told))


# ---- which rows -------------------------------------------------------------------------------------------------------


def _keeps(keep: Keep | None) -> Callable[[Row], bool]:
    if keep is None:
        return lambda row: True
    if isinstance(keep, str) and not is_own(keep):
        raise ValueError(f"keep needs a function or module:function; got {keep!r}.")
    function = imported(keep, "rows to keep") if isinstance(keep, str) else keep

    def keeps(row: Row) -> bool:
        try:
            return bool(function(row[0]))
        except Exception as error:
            raise ValueError(f"keep raised {type(error).__name__}: {error} on {row[1]}.") from error

    return keeps


def _fits(characters: int, tokens: int, tokenizer: Any) -> Callable[[list[Problem]], list[Problem]]:
    """Those problems whose prompts are short enough."""
    if tokens and tokenizer is None:
        raise ValueError(
            "max_tokens counts with a tokenizer. Give tokenizer= a folder or a hub name, or use max_characters."
        )

    def fits(problems: list[Problem]) -> list[Problem]:
        if characters:
            problems = [p for p in problems if _characters(p.prompt) <= characters]
        if tokens and problems:
            problems = [p for p, length in zip(problems, _tokens(problems, tokenizer), strict=True) if length <= tokens]
        return problems

    return fits


def _characters(prompt: str | Sequence[Message]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)


def _tokens(problems: Sequence[Problem], tokenizer: Any) -> list[int]:
    """The tokens of each prompt as the policy reads it: text with the tokenizer's marks, messages in its chat template."""
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    chat = not isinstance(problems[0].prompt, str)
    texts = [
        tokenizer.apply_chat_template(list(p.prompt), tokenize=False, add_generation_prompt=True) if chat else p.prompt
        for p in problems
    ]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=not chat)["input_ids"]]


# ---- what can be known before the run ---------------------------------------------------------------------------------


def _checked(problems: Sequence[Problem], verify: Any, verifier: Verifier) -> list[str]:
    """Refuse gold answers that cannot be verified, and tell of solutions that do not give their answer."""
    if verify == "math":
        for p in problems[:_TRIED]:
            if verifier(p, f"\\boxed{{{p.answer}}}") != 1:
                raise ValueError(
                    f"math-verify does not accept the answer {p.answer!r} as its own; the question: {p.question[:80]!r}."
                )
    elif isinstance(verify, str) and verify not in VERIFIERS and problems:
        verifier(problems[0], problems[0].answer or "?")
    if verify not in _QUICK:
        return []
    wrong = [p for p in problems if p.solution is not None and verifier(p, p.solution) != 1]
    shown = f", for example that of {wrong[0].question[:80]!r}, whose answer is {wrong[0].answer!r}" if wrong else ""
    return [f"{len(wrong)} worked solutions do not give their answer{shown}"] if wrong else []

"""What a run put around each question, read off its record, so that the trained model can be asked in the same way."""

from collections.abc import Iterable
from dataclasses import dataclass

from apportion.record import Run


@dataclass(frozen=True)
class Form:
    """The text before and after the question in every prompt of a run, special tokens as their literal text."""

    before: str
    after: str

    def of(self, question: str) -> str:
        """The prompt that asks this.

        >>> Form("Q: ", "\\n").of("2+2=?")
        'Q: 2+2=?\\n'
        """
        return f"{self.before}{question}{self.after}"


def form_of(asked: Iterable[tuple[str, str]]) -> Form | None:
    """What all of these (prompt, question) have in common; None if a prompt lacks its question or they differ.

    >>> form_of([("Q: 2+2=?\\n", "2+2=?"), ("Q: 1+3=?\\n", "1+3=?")])
    Form(before='Q: ', after='\\n')
    >>> form_of([("Hint: 4. 2+2=?", "2+2=?"), ("1+3=?", "1+3=?")])
    """
    forms = set()
    for prompt, question in asked:
        before, found, after = prompt.rpartition(question)
        forms.add(Form(before, after) if found else None)
    return forms.pop() if len(forms) == 1 else None


def recorded_form(run: Run) -> Form | None:
    """The form of the prompts in the last recorded step; None where there is no such step, or no common form."""
    asked = recorded_prompts(run)
    return form_of(asked) if asked else None


def recorded_prompts(run: Run) -> list[tuple[str, str]]:
    """The different (prompt, question) of the last recorded step, in order."""
    steps = run.steps()
    if not steps:
        return []
    rollouts = run.rollouts(steps[-1])
    if not {"pieces", "question"} <= rollouts.meta.keys():
        return []
    first_action = rollouts.action_mask.int().argmax(1).tolist()
    prompts = ["".join(row[:n]) for row, n in zip(rollouts.meta["pieces"], first_action, strict=True)]
    return list(dict.fromkeys(zip(prompts, rollouts.meta["question"], strict=True)))

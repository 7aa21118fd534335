"""Small recorded runs, made by hand, and a way to call the command line."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from apportion import Rollouts
from apportion.cli.main import main
from apportion.record import RunWriter, write_jsonl

PROMPT = ["What", " is", " 3", "+", "4", "*", "2", "?", "\n"]
GOOD = ["4*2", "=", "8", "\n", "3+8", "=", "11"]
BAD = ["3+4", "=", "7", "\n", "7*2", "=", "\x1b[31m[bold]14"]


def rollouts(prompt_id="p0"):
    """Two right and two wrong answers of two steps; three critiques agree that the last step of a wrong one is wrong."""
    answers = [GOOD, BAD, BAD, GOOD]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*PROMPT, *GOOD, *BAD]))}
    n = len(PROMPT)
    return Rollouts.from_lists(
        [[vocabulary[x] for x in [*PROMPT, *answer]] for answer in answers],
        [0] * 4,
        outcome=[1.0, 0.0, 0.0, 1.0],
        steps=[[(n, n + 4), (n + 4, n + 7)]] * 4,
        judge=[[[0.0] * 3, [0.0] * 3 if a is GOOD else [1.0] * 3] for a in answers],
        action_mask=[[False] * n + [True] * 7] * 4,
        meta={
            "prompt_id": [prompt_id] * 4,
            "question": ["What is 3+4*2?"] * 4,
            "answer": ["11"] * 4,
            "text": ["".join(answer) for answer in answers],
            "pieces": [[*PROMPT, *answer] for answer in answers],
        },
    )


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def apportion(capsys: pytest.CaptureFixture[str]):
    """Call the command line in this process."""

    def call(*argv: object) -> Answer:
        code = main([str(x) for x in argv])
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A CAPO run of two steps."""
    from apportion.credit import capo

    writer = RunWriter.create(tmp_path / "capo", {"credit": repr(capo()), "config": {"lr": 0.1}, "seed": 0})
    for step in (0, 1):
        batch = rollouts(f"p{step}")
        writer.append(step, batch, capo()(batch))
        writer.metrics(step, "train", tokens=28 * (step + 1), reward=0.5)
    return writer.path


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """The same rollouts as JSON lines, without credit."""
    write_jsonl(tmp_path / "log.jsonl", rollouts())
    return tmp_path / "log.jsonl"

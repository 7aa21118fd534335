"""Makes docs/images/heatmap.svg: what `apportion show` prints in a terminal, exported by rich.

Four answers to one question are split into steps, verified and judged by the library; `apportion show --credit capo`
then draws one of them. Run it from the root of the project: python docs/images/heatmap.py
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from apportion import Rollouts
from apportion.record import write_jsonl
from apportion.signals import last_number, lines, tool_judge

QUESTION, ANSWER = "7+5-3+6=?", "15"
RIGHT, WRONG, LUCKY = "7+5=12\n12-3=9\n9+6=15", "7+5=12\n12-3=8\n8+6=14", "7+5=13\n13-3=9\n9+6=15"
ANSWERS = [RIGHT, LUCKY, RIGHT, WRONG]
COMMAND = "apportion show answers.jsonl --credit capo --row 1"


def measured() -> Rollouts:
    """The answers, one character a token, with outcome, steps and verdicts."""
    pieces = [list(answer) for answer in ANSWERS]
    rollouts = Rollouts.from_lists(
        [[ord(c) for c in row] for row in pieces],
        [0] * len(pieces),
        outcome=[float(last_number(answer) == int(ANSWER)) for answer in ANSWERS],
        meta={"pieces": pieces, "question": [QUESTION] * len(pieces), "answer": [ANSWER] * len(pieces)},
    )
    rollouts = rollouts.with_spans(step=lines()(rollouts))
    return rollouts.with_signals(**tool_judge(chained=True, question_numbers=True).measure(rollouts))


def main(target: Path) -> None:
    """Show the second answer, right by two mistakes, and save the terminal as a picture."""
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "answers.jsonl", measured())
        command = [sys.executable, "-m", "apportion.cli.main", *COMMAND.split()[1:]]
        terminal = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color", "COLUMNS": "96"}
        done = subprocess.run(command, cwd=folder, env=os.environ | terminal, capture_output=True, check=True)
    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(f"$ {COMMAND}\n" + done.stdout.decode()))
    picture = console.export_svg(title="apportion show", unique_id="heatmap")
    target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # no fonts from the network


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/heatmap.svg"))

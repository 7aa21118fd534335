"""The main job in miniature: a real language model learns multi-step arithmetic, with two kinds of credit side by side.

    python recipes/demo.py                                           # one seed, a few minutes
    python recipes/demo.py --seeds 0 1 2 --page docs/results/demo.md # three seeds, with a page

SmolLM2-135M-Instruct first learns from worked solutions to write one equation a line. From there it is trained twice on
the same prompts: with plain GRPO, which spreads the outcome over all tokens, and with CAPO, whose judge here is a tool
that recomputes every equation and takes credit from the wrong steps.
Interrupted, or asked for more steps, it goes on where it was.
"""

import argparse
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from apportion.record import Run
from demo_page import write_page

MODEL, TASK, METHODS = "smollm2-135m-instruct", "arithmetic", ("grpo", "capo")
WARMUP = 30
SETTINGS = ["--task", TASK, "--max-new-tokens", "32", "--lr", "1e-5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each method per seed")
    parser.add_argument("--steps", type=int, default=24, help="policy updates of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="write the results as a Markdown page")
    options = parser.parse_args()
    command = " ".join(["python", *sys.argv])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    say(f"1/3 warm-up: {WARMUP} supervised steps on worked solutions")
    warm = options.out / "warmup"
    train(warm, 0, "--model", MODEL, "--warmup", str(WARMUP), "--eval-every", "0", *SETTINGS)

    jobs = [(method, seed) for seed in options.seeds for method in METHODS]
    say(f"2/3 reinforcement learning: {options.steps} steps of 8 x 8 responses, {' and '.join(METHODS)}")
    with ThreadPoolExecutor(max_workers=side_by_side()) as pool:
        runs = list(pool.map(lambda job: reinforce(options.out, warm, options.steps, *job), jobs))

    say("3/3 what came out")
    apportion("compare", *map(str, runs), "--out", str(options.out / "curves.png"))
    for run in runs[: len(METHODS)]:
        say(f"the credit of one response in {run}")
        apportion("show", str(run))
    if options.page:
        write_page(options.page, runs, options.out / "curves.png", command, about(options.steps))
    say(f"The runs are in {options.out}. Next: {COMMAND} show {runs[-1]} --step 1, or {COMMAND} train --help")


def side_by_side() -> int:
    """Two runs at a time where there are two cores and 6 GB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2 if (os.cpu_count() or 1) > 1 and memory > 12e9 else 1


def reinforce(out: Path, warm: Path, steps: int, method: str, seed: int) -> Path:
    run = out / f"{method}-{seed}"
    options = ["--model", str(warm / "model"), "--credit", method, "--seed", str(seed)]
    train(run, steps, *options, "--eval-every", "12", "--no-save-model", *SETTINGS, prefix=run.name)
    return run


def train(out: Path, steps: int, *options: str, prefix: str = "") -> None:
    """Start a run, go on with one that was interrupted or is to have more steps, or leave a finished one alone."""
    if not (out / "run.json").is_file():
        apportion("train", "--out", str(out), "--steps", str(steps), *options, prefix=prefix)
    elif not finished(out, steps):
        apportion("train", "--resume", str(out), "--steps", str(steps), prefix=prefix)


def finished(out: Path, steps: int) -> bool:
    """The warm-up ends with its model, a run with its last evaluation."""
    if not steps:
        return (out / "model" / "tokenizer.json").is_file()
    return any(m["step"] >= steps for m in Run(out).metrics("eval"))


def apportion(*arguments: str, prefix: str = "") -> None:
    """Run the command line of the library; lines of runs that share the terminal begin with the run's name."""
    command = [sys.executable, "-m", "apportion.cli.main", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE if prefix else None, text=True) as process:
        for line in process.stderr or ():
            with PRINTING:
                print(f"{prefix:8} {line}", end="", file=sys.stderr, flush=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}.")


def about(steps: int) -> str:
    return (
        f"{MODEL} on the task `{TASK}` (four one-digit numbers, three equations): {WARMUP} supervised steps on 16 worked "
        f"solutions each, then {steps} steps of 8 prompts x 8 responses with `{' '.join(SETTINGS)}`, everything else at its "
        "default. CAPO's judge is the task's tool judge, which recomputes every equation."
    )


PRINTING = threading.Lock()
COMMAND = ".venv/bin/apportion" if Path(".venv/bin/apportion").exists() else "apportion"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()

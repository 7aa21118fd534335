"""`apportion train`"""

import inspect
import io
import os
import re
import shlex
import sys
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from typing import Any

from apportion.cli._app import call_with, print_json
from apportion.cli._compose import own, parse_credit, parse_task
from apportion.cli._errors import UserError, nearest
from apportion.cli._rewards import parse_reward
from apportion.train.config import Config, Options
from apportion.train.models import user_cache


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Train a language model with a credit method, and record everything.

    --model, --task and --out are needed, or --resume; everything else has a default.

    Examples:
      apportion train --model smollm2-135m-instruct --task arithmetic --warmup 30 --credit capo --out runs/capo
      apportion train --model runs/capo/model --task "arithmetic(terms=5)" --credit "chain(grpo(), clip(limit=2.0))" --out runs/five
      apportion train --model smollm2-135m-instruct --task my_module:my_task --credit gae --critic head --critic-warmup 5 --out runs/ppo
      apportion train --model MODEL --task "from_data(path='mine.jsonl')" --rewards my_module:polite "0.1*overlong(limit=200, buffer=50)" --out runs/mine
      apportion train --resume runs/capo
      apportion train --resume runs/capo --steps 100
    """

    # ---- task, credit and rewards ----
    task: str
    """A name, a call with literals, or your own module:function; see `apportion tasks`."""
    credit: str = "grpo"
    """A name, a composition, or your own module:function; see `apportion methods`."""
    rewards: tuple[str, ...] = ()
    """Rewards beside the task's verifier: module:function, a built-in one as overlong(limit=200, buffer=50), or model:FOLDER; each may have its weight in front, as in 0.5*module:function."""
    step_reward: str = ""
    """Your own module:function that rewards each written step, for methods that read `signals.process`."""
    measures: tuple[str, ...] = ()
    """Your own measures of other signals: module:object, or module:function that makes one."""
    group_sizes: str = ""
    """Your own module:function from a problem to its number of responses; empty = group_size for each."""

    # ---- steps and judges ----
    splitter: str = "auto"
    """What cuts responses into steps: auto (the task's own), lines, sentences or blank_lines."""
    judge: str = "auto"
    """Who judges steps: auto (the task's own), tool (recomputes equations), or the address of an OpenAI-compatible server (http://127.0.0.1:8000/v1)."""
    judge_model: str = ""
    """Name of the model at that address."""
    judge_critiques: int = 4
    """Critiques per response."""
    judge_cache: str = ""
    """Folder that keeps the judge's replies; empty = apportion/judge in the user's cache folder."""
    judge_calls: int = 0
    """Most calls of the judge in the whole run; 0 = no limit."""
    judge_seconds: float = 0.0
    """Most seconds of judging in a step; 0 = no limit."""

    # ---- the call ----
    resume: str = ""
    """Folder of a run to go on with, with the options it was started with; those given now win."""
    json: bool = False
    """Print where the run lies, and its last numbers, as JSON."""


def main(argv: list[str]) -> int:
    """Parse and run; `--resume RUN` takes the options that RUN was started with, later ones win."""
    if {"-h", "--help"} & set(argv):
        return _help()
    argv = [part for text in argv for part in (text.split("=", 1) if text.startswith("--resume=") else [text])]
    resumed = "--resume" in argv
    if resumed:
        argv = _recorded(argv)
    return call_with(Arguments, argv, "train", lambda arguments: _train(arguments, argv, resumed))


def _help() -> int:
    """The help, with the headings under which the options stand in the source."""
    page = _Page()
    with redirect_stdout(page):
        code = call_with(Arguments, ["--help"], "train", lambda _: 0)
    text, source = page.getvalue(), inspect.getsource(Options) + inspect.getsource(Arguments)
    rule = max(re.findall("-+", text), key=len)
    for heading, field in re.findall(r"# -+ (.+?) -+\n +(\w+):", source):
        first = rf"(?m)^(?=(?:\x1b\[[\d;]*m| )*--(no-)?{field.replace('_', '-')}(?![\w-]))"
        text = re.sub(first, f"\n {heading}\n {rule}\n", text, count=1)
    print(text, end="")
    return code


class _Page(io.StringIO):
    """Keeps what is printed, in the colours that the terminal would get."""

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _train(arguments: Arguments, argv: list[str], resume: bool) -> int:
    from apportion.record import Run
    from apportion.train import run

    if not arguments.progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers', while it loads and saves models
    config = _config(arguments)
    folder = run(config, resume=resume, command=shlex.join(["apportion", "train", *argv]))
    last = Run(folder).metrics("eval")[-1:]
    if arguments.json:
        print_json({"run": str(folder), "eval": last})
    elif arguments.progress:
        print(f"The run is in {folder}. See it: apportion show {folder}", file=sys.stderr)
    return 0


def _config(arguments: Arguments) -> Config:
    credit = parse_credit(arguments.credit)
    options: dict[str, Any] = {f.name: getattr(arguments, f.name) for f in fields(Options)}
    return Config(
        **options,
        task=parse_task(arguments.task),
        credit=credit,
        rewards=tuple(map(parse_reward, arguments.rewards)),
        judge=_judge(arguments),
        splitter=_splitter(arguments.splitter),
        measures=_measures(arguments, {*credit.requires, f"spans.{arguments.ratio}"}),
        group_sizes=_group_sizes(arguments.group_sizes),
    )


def _group_sizes(text: str) -> Any:
    return _takes("--group-sizes", text, own("--group-sizes", text), "problem") if text else None


def _measures(arguments: Arguments, requires: Collection[str]) -> tuple[Any, ...]:
    """The user's own, and where the method reads them: macro actions of five tokens, scores of steps from a judge's
    verdicts, and a process reward model that learns from the outcomes."""
    from apportion.signals import VerdictScore, fixed_ngrams
    from apportion.train import OnlinePRM, SpansFrom, StepReward

    offered = {
        "signals.process": VerdictScore(),
        "signals.log_ratio": OnlinePRM(),
        "spans.macro": SpansFrom("macro", fixed_ngrams(5)),
    }
    measures = [measure for needed, measure in offered.items() if needed in requires]
    if arguments.step_reward:
        own("--step-reward", arguments.step_reward)
        measures.append(StepReward(arguments.step_reward))  # as text: it runs in a process that can be killed
    return (*measures, *map(_measure, arguments.measures))


def _measure(text: str) -> Any:
    """The measure itself, or what a function without arguments makes."""
    found = own("--measures", text)
    if callable(found) and (isinstance(found, type) or not hasattr(found, "measure")):
        found = _takes("--measures", text, found)()
    if not hasattr(found, "measure"):
        raise UserError(f"--measures {text} is a {type(found).__name__}. A measure has provides, requires and measure.")
    return found


def _takes(option: str, text: str, function: Any, *names: str) -> Any:
    """The function, which can be called with arguments of these names.

    Raises:
        UserError: it cannot.
    """
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise UserError(f"{option} {text} is called as {text}({', '.join(names)}), but: {error}.") from None
    return function


def _splitter(name: str) -> Any:
    from apportion import signals

    makers = {"lines": signals.lines, "sentences": signals.sentences, "blank_lines": signals.blank_lines}
    if name == "auto":
        return None
    if name not in makers:
        raise UserError(f"--splitter {name!r} is unknown. {nearest(name, ['auto', *makers])}")
    return makers[name]()


def _judge(arguments: Arguments) -> Any:
    from apportion import signals

    where = arguments.judge
    if where == "auto":
        return None
    if where == "tool":
        return signals.tool_judge()
    if not where.startswith(("http://", "https://")):
        raise UserError(
            f"--judge {where!r} is unknown. {nearest(where, ['auto', 'tool'])} Or give an address (http://...)."
        )
    if not arguments.judge_model:
        raise UserError(f"--judge {where} needs --judge-model, the name of the model at that address.")
    return signals.LLMJudge(
        model=arguments.judge_model,
        base_url=where,
        critiques=arguments.judge_critiques,
        cache=arguments.judge_cache or user_cache("judge"),
        max_calls=arguments.judge_calls or None,
        max_seconds=arguments.judge_seconds or None,
    )


def _recorded(argv: list[str]) -> list[str]:
    """The options in run.json's command, then those given now."""
    from apportion.record import Run

    at = argv.index("--resume")
    if at + 1 == len(argv):
        raise UserError("--resume needs the folder of a run. Example: apportion train --resume runs/capo")
    command = shlex.split(Run(argv[at + 1]).info.get("command") or "")
    if command[:2] != ["apportion", "train"]:
        raise UserError(
            f"the run in {argv[at + 1]} was not started by apportion train. Resume it in Python: run(config, resume=True)."
        )
    return [*command[2:], "--out", argv[at + 1], *argv[:at], *argv[at + 2 :]]

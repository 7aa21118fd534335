"""Checks docs/coming-from.md: no option of another trainer is forgotten, and none is named that does not exist.

Run: python docs/coming_from.py                  TRL, as it is installed, and our own names in every chapter
     python docs/coming_from.py --verl YAML      verl/trainer/config/_generated_ppo_trainer.yaml (needs omegaconf)
     python docs/coming_from.py --openrlhf PY    openrlhf/cli/train_ppo_ray.py
     ... --list                                  every option with its default, instead
"""

import argparse
import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

PAGE = Path(__file__).with_name("coming-from.md")
ABSENT = "–"
ASKED_FOR = (
    *("GRPOTrainer", "RLOOTrainer", "GRPOConfig", "RLOOConfig"),
    *("TrainingArguments", "ModelConfig", "ScriptArguments"),
)
"""The classes of TRL whose fields stand under a theme."""
Found = dict[str, dict[str, Any]]
"""Options with their defaults, by what they belong to: a class of TRL's, or the whole of verl or OpenRLHF."""


@dataclass(frozen=True)
class Row:
    """A line of a table: names of theirs (`*` is anything), their default, ours, and the difference or reason."""

    kinds: tuple[str, ...]
    theirs: tuple[str, ...]
    default: str
    ours: str
    why: str


def rows(page: str, trainer: str) -> list[Row]:
    """The rows of a trainer's chapter.

    Under `###` stands a theme; under `####`, of TRL's, the classes that are named there, separated by commas. A `####` of
    verl's may begin with what the names under it begin with, in backticks.
    """
    chapter = next(x for x in re.split(r"^## ", page, flags=re.MULTILINE) if x.startswith(trainer))
    made: list[Row] = []
    themed = ASKED_FOR if trainer == "TRL" else (trainer,)
    kinds, prefix = themed, ""
    for line in chapter.splitlines():
        if line.startswith("### "):
            kinds, prefix = themed, ""
        elif line.startswith("#### ") and trainer == "TRL":
            kinds = tuple(line[5:].split(", "))
        elif line.startswith("#### "):
            prefix = "".join(f"{x}." for x in quoted(line)[:1])
        elif line.startswith("| `"):
            theirs, default, ours, why = (cell.strip() for cell in line.strip("|").split(" |"))
            made.append(Row(kinds, tuple(prefix + x for x in quoted(theirs)), default, ours, why))
    return made


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`(.+?)`", cell)


# ---- what the others have --------------------------------------------------------------------------------------------


def trl() -> Found:
    """Every public dataclass of the installed TRL, and what its two trainers with rewards take.

    "TrainingArguments" are transformers' fields with the defaults of GRPOConfig; the other classes are what they add.
    """
    import trl as package
    from transformers import TrainingArguments
    from trl.scripts.utils import DatasetConfig

    public = [getattr(package, name) for name in dir(package)]
    classes = [x for x in public if inspect.isclass(x) and is_dataclass(x)]
    inherited = {f.name for f in fields(TrainingArguments)}
    found = {
        made.__name__: {f.name: default_of(f) for f in fields(made) if f.name not in inherited}
        for made in (*classes, DatasetConfig)
    }
    found["TrainingArguments"] = {f.name: default_of(f) for f in fields(package.GRPOConfig) if f.name in inherited}
    for trainer in (package.GRPOTrainer, package.RLOOTrainer):
        taken = inspect.signature(trainer).parameters.values()
        found[trainer.__name__] = {p.name: "needed" if p.default is p.empty else p.default for p in taken}
    return found


def default_of(field: Any) -> Any:
    """Of a dataclass field."""
    if field.default is not MISSING:
        return field.default
    return "needed" if field.default_factory is MISSING else field.default_factory()


def verl(path: Path) -> Found:
    """Every leaf of verl's configuration by its dotted name, with references followed."""
    from omegaconf import OmegaConf

    tree = OmegaConf.load(path)

    def leaves(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and value:
                made |= leaves(value, f"{name}.")
            elif key != "_target_":
                made[name] = value if value == "???" else OmegaConf.select(tree, name)
        return made

    return {"verl": leaves(OmegaConf.to_container(tree, resolve=False), "")}


def openrlhf(path: Path) -> Found:
    """Every argument of OpenRLHF's train_ppo_ray.py; only the lines that build its parser are executed."""
    main = next(x for x in ast.parse(path.read_text()).body if isinstance(x, ast.If))
    built = next(i for i, x in enumerate(main.body) if ast.unparse(x) == "args = parser.parse_args()")
    made: dict[str, Any] = {"argparse": argparse, "datetime": datetime}
    exec(compile(ast.Module(main.body[:built], []), str(path), "exec"), made)
    actions = [action for action in made["parser"]._actions if action.dest != "help"]
    return {"OpenRLHF": {name: action.default for action in actions for name in action.option_strings}}


# ---- what is wrong with the page -------------------------------------------------------------------------------------


def problems(told: Sequence[Row], found: Found) -> list[str]:
    """Options without a row, names that match nothing, and defaults that are not the real ones.

    A default is written only where a row has one option. Where the heading's classes differ it is all of theirs, in order.
    """
    made = []
    for kind, options in found.items():
        named = [x for row in told if kind in row.kinds for x in row.theirs]
        made += [f"{kind}: {x} has no row" for x in options if not any(fnmatchcase(x, n) for n in named)]
    for row in told:
        here = [found[kind] for kind in row.kinds]
        known = [name for options in here for name in options]
        made += [f"{row.kinds}: {x} does not exist" for x in row.theirs if not any(fnmatchcase(k, x) for k in known)]
        real = list(dict.fromkeys(shown(options[x]) for x in row.theirs[:1] for options in here if x in options))
        if row.default and quoted(row.default) != real:
            made.append(f"{row.kinds}: {row.theirs[0]} is {' and '.join(real)} by default, not {row.default}")
    return made


def shown(value: Any) -> str:
    """A default as the page writes it: as Python does, text without quotation marks."""
    return value if isinstance(value, str) and value else repr(value)


def our_problems(told: Sequence[Row]) -> list[str]:
    """Names of ours that do not exist, empty cells, and absences without a reason."""
    made = [f"{row.theirs[0]}: neither ours nor a reason" for row in told if row.ours in ("", ABSENT) and not row.why]
    return made + [f"{row.theirs[0]}: {x}" for row in told for name in quoted(row.ours) if (x := wrong(name))]


def wrong(ours: str) -> str:
    """What is wrong with a name of ours: `option`, `option=value`, or something exported, perhaps `name(setting, ...)`."""
    from apportion.cli.train import Arguments
    from apportion.train import Config

    if "(" in ours or ours.partition("=")[0] not in {f.name for f in (*fields(Config), *fields(Arguments))}:
        return wrong_call(ours)
    name, _, value = ours.partition("=")
    allowed = get_type_hints(Config).get(name)
    if value and get_origin(allowed) is Literal and value not in get_args(allowed):
        return f"{name} cannot be {value}"
    return ""


def wrong_call(ours: str) -> str:
    """What is wrong with `gae`, `group_relative.trl()`, `from_data(prompt, answer)`: no room exports it, or no such setting."""
    from apportion import credit, losses, signals, tasks, train

    name, _, settings = ours.removesuffix(")").partition("(")
    first, _, then = name.partition(".")
    room = next((room for room in (credit, losses, signals, tasks, train) if first in room.__all__), None)
    made = getattr(room, first, None)
    made = getattr(made, then, None) if then else made
    if made is None:
        return f"we have no {name}"
    given = [x.partition("=")[0] for x in settings.split(", ") if x not in ("", "...")]
    return "".join(f"{name} has no {x}" for x in given if x not in inspect.signature(made).parameters)


def main() -> int:
    """Print what is wrong, or with --list what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl", type=Path, metavar="YAML")
    parser.add_argument("--openrlhf", type=Path, metavar="PY")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    found = verl(asked.verl) if asked.verl else openrlhf(asked.openrlhf) if asked.openrlhf else trl()
    if asked.list:
        print(
            *(f"{kind} {name} = {shown(x)}" for kind, options in found.items() for name, x in options.items()), sep="\n"
        )
        return 0
    page, trainer = PAGE.read_text(), "verl" if asked.verl else "OpenRLHF" if asked.openrlhf else "TRL"
    made = problems(rows(page, trainer), found)
    if trainer == "TRL":
        made += [wrong for name in ("TRL", "verl", "OpenRLHF") for wrong in our_problems(rows(page, name))]
    print(*(made or [f"{sum(map(len, found.values()))} options of {trainer}: each has its row"]), sep="\n")
    return int(bool(made))


if __name__ == "__main__":
    raise SystemExit(main())

"""Writes the table of options in docs/train.md from the dataclasses. Run: python docs/options.py"""

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "train.md"
CLASSES = (("src/apportion/train/config.py", "Options"), ("src/apportion/cli/train.py", "Arguments"))


def rows(path: str, name: str) -> list[str]:
    """One line of the table per field: its flag, its default, the text under it."""
    tree = ast.parse((ROOT / path).read_text())
    lines = (ROOT / path).read_text().splitlines()
    body = next(x.body for x in tree.body if isinstance(x, ast.ClassDef) and x.name == name)
    out = []
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign):
            heading = re.fullmatch(r"\s*# -+ (.+?) -+", lines[field.lineno - 2])
            out += [f"| **{heading[1]}** | | |"] if heading else []
            out.append(f"| `{flag(field)}` | {default(field)} | {ast.literal_eval(text.value)} |")
    return out


def flag(field: ast.AnnAssign) -> str:
    """The spelling on the command line; what is on by default is switched off."""
    name = ast.unparse(field.target).replace("_", "-")
    return f"--no-{name}" if default(field) == "`True`" else f"--{name}"


def default(field: ast.AnnAssign) -> str:
    """As Python writes it."""
    return f"`{ast.unparse(field.value)}`" if field.value else "needed"


def table() -> str:
    """The whole table."""
    lines = [line for path, name in CLASSES for line in rows(path, name)]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *lines]) + "\n"


def renewed(page: str) -> str:
    """The page with its table written anew."""
    return re.sub(r"(?<=<!-- options -->\n).*?(?=<!-- end -->)", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))

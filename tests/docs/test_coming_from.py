"""docs/coming-from.md forgets no option of TRL's, names none of ours that does not exist, and its first run is one."""

import ast
import re
import runpy
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "coming-from.md").read_text()
CHAPTERS = ("TRL", "verl", "OpenRLHF")
THEMES = (
    "Batches and updates, Sampling, Loss, KL, Critic, Rewards and credit, Data, Evaluation, Model, saving and machine"
)


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "coming_from.py"))


@pytest.fixture(scope="module")
def trl(script):
    return script["trl"]()


def test_every_option_of_trl_has_a_row_with_its_default(script, trl):
    """If not: python docs/coming_from.py"""
    assert script["problems"](script["rows"](PAGE, "TRL"), trl) == []
    assert {"GRPOConfig", "ModelConfig", "ScriptArguments", "TrainingArguments", "GRPOTrainer"} <= trl.keys()
    assert len(trl["GRPOConfig"]) > 70
    assert len(trl["TrainingArguments"]) > 100


@pytest.mark.parametrize("trainer", CHAPTERS)
def test_every_name_of_ours_exists(script, trainer):
    told = script["rows"](PAGE, trainer)
    assert len(told) > 80
    assert script["our_problems"](told) == []


@pytest.mark.parametrize("trainer", CHAPTERS)
def test_what_is_asked_for_most_comes_first(script, trainer):
    """By theme, short enough to read, and the same themes for all three."""
    chapter = next(x for x in re.split(r"^## ", PAGE, flags=re.MULTILINE) if x.startswith(trainer))
    first = chapter.partition(f"\n### Everything else of {trainer}\n")[0]
    themes = re.findall(r"^### (.+)$", first, re.MULTILINE)
    assert ", ".join(themes) == THEMES
    assert 45 <= first.count("\n| `") <= 75


def test_the_version_is_the_installed_one():
    pins = (DOCS.parent / "constraints.txt").read_text() + (DOCS.parent / "constraints-verl.txt").read_text()
    named = re.findall(r"^## (TRL|verl) (\S+)$", PAGE, re.MULTILINE)
    assert len(named) == 2
    for package, version in named:
        assert f"\n{package.lower()}=={version}\n" in pins


def cell(page: str, old: str, new: str) -> str:
    assert page.count(old) == 1
    return page.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "| `num_iterations` |",
            "| `num_loops` |",
            ["RLOOConfig: num_iterations has no row", "num_loops does not exist"],
        ),
        ("| `epsilon` | `0.2` |", "| `epsilon` | `0.3` |", ["epsilon is 0.2 by default, not `0.3`"]),
        ("| `8`, RLOO `2` |", "| `8` |", ["num_generations is 8 and 2 by default, not `8`"]),
        (
            "| `max_completion_length` | `512` | `max_new_tokens` |",
            "| `max_completion_length` | `512` | `max_tokens` |",
            ["we have no max_tokens"],
        ),
        ("| `precision=float32` |", "| `precision=float8` |", ["precision cannot be float8"]),
        ("| `rloo.trl(normalize_advantages)` |", "| `rloo.trl(normalise)` |", ["rloo.trl has no normalise"]),
        (
            "| `min_p` | `None` | – | not built; it",
            "| `min_p` | `None` | – | |\nit",
            ["min_p: neither ours nor a reason"],
        ),
    ],
)
def test_what_is_wrong_is_told(script, trl, old, new, said):
    told = script["rows"](cell(PAGE, old, new), "TRL")
    made = "\n".join(script["problems"](told, trl) + script["our_problems"](told))
    assert [x for x in said if x not in made] == []


def test_openrlhf_is_read_from_its_parser(script, tmp_path):
    """OpenRLHF itself is not installed; its page was compared by hand."""
    source = (
        'import ray\nif __name__ == "__main__":\n    parser = argparse.ArgumentParser()\n'
        '    for prefix in ("actor", "critic"):\n        parser.add_argument(f"--{prefix}.lr", type=float, default=1e-6)\n'
        "    args = parser.parse_args()\n    raise RuntimeError\n"
    )
    (tmp_path / "train.py").write_text(source)
    assert script["openrlhf"](tmp_path / "train.py") == {"OpenRLHF": {"--actor.lr": 1e-6, "--critic.lr": 1e-6}}


# ---- the same run in three trainers -------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    text = PAGE.partition("## The same run")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_its_reward_is_right(tmp_path):
    made: dict = {}
    exec(blocks("python")[0], made)
    score = made["compute_score"]
    assert score("gsm8k", "18 - 4 = 14, so 1,014.", "1014") == 1.0
    assert score("gsm8k", "I do not know", "14") == score("gsm8k", "14, no, 15", "14") == 0.0


def test_its_trl_is_trl():
    from trl import GRPOConfig

    tree = ast.parse(blocks("python")[1])
    (call,) = (x for x in ast.walk(tree) if isinstance(x, ast.Call) and ast.unparse(x.func) == "GRPOConfig")
    named = {x.arg for x in call.keywords}
    assert len(named) > 5
    assert named <= {f.name for f in fields(GRPOConfig)}


def test_ours_starts(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    import apportion.train
    from apportion.cli.main import main

    rows = [
        {"prompt": [{"role": "user", "content": f"{n} + {n}?"}], "reward_model": {"ground_truth": str(2 * n)}}
        for n in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:32]), tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[32:]), tmp_path / "test.parquet")
    (tmp_path / "right.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "right", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    monkeypatch.setattr(apportion.train, "run", lambda config, **_: seen.append(config) or exit_here())

    (command,) = (x for x in blocks("sh") if x.startswith("apportion"))
    with pytest.raises(StopIteration):
        main(shlex.split(command.replace("\\\n", " "))[1:])
    monkeypatch.delitem(sys.modules, "right")
    config, problem = seen[0], seen[0].task.train[3]
    assert (config.prompts_per_step, config.group_size, config.lr, config.truncated_reward) == (32, 8, 1e-6, None)
    assert [config.rewards[0].function(problem, text) for text in ("3 + 3 = 6", "3 + 3 = 7")] == [1.0, 0.0]


def exit_here():
    raise StopIteration

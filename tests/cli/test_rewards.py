"""--rewards: from what is typed to a reward."""

import pytest

from apportion.cli._errors import UserError
from apportion.cli._rewards import parse_reward
from apportion.tasks import Problem

MODULE = """
from apportion.train import Reward
def polite(problem, text):
    return float("please" in text)
async def asked(problem, text):
    return 1.0
def trl_style(completions, **columns):
    return [1.0 for _ in completions]
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.25}
def no_reward():
    return 1.0
ready = Reward(lambda problem, text: 2.0, weight=3.0, name="ready")
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_cli_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("own_cli_rewards:polite", "Reward(own_cli_rewards:polite, weight=1, name='polite')"),
        ("0.5*own_cli_rewards:polite", "Reward(own_cli_rewards:polite, weight=0.5, name='polite')"),
        ("-1e-2*own_cli_rewards:asked", "Reward(own_cli_rewards:asked, weight=-0.01, name='asked')"),
        ("kind=.5*own_cli_rewards:polite", "Reward(own_cli_rewards:polite, weight=0.5, name='kind')"),
        ("2*own_cli_rewards:ready", "Reward(own_cli_rewards:<lambda>, weight=6, name='ready')"),
        ("trl:own_cli_rewards:trl_style", "Reward(trl_reward(own_cli_rewards:trl_style), weight=1, name='trl_style')"),
        (
            "verl:own_cli_rewards:compute_score",
            "Reward(verl_reward(own_cli_rewards:compute_score), weight=1, name='compute_score')",
        ),
        ("0.1*overlong(limit=200, buffer=50)", "Reward(overlong(limit=200, buffer=50), weight=0.1, name='overlong')"),
        ("form=0.2*matches('a=b*c')", "Reward(matches('a=b*c'), weight=0.2, name='form')"),
        ("repetition()", "Reward(repetition(n=3), weight=1, name='repetition')"),
        ("of_signal('environment')", "Reward(of_signal('environment'), weight=1, name='of_environment')"),
        ("0.5*model:some/folder", "Reward(RewardModel(folder='some/folder'), weight=0.5, name='reward_model')"),
    ],
)
def test_what_is_typed_is_a_reward(text, shown):
    assert repr(parse_reward(text)) == shown


def test_a_plain_function_runs_in_a_process_an_async_one_here():
    reward = parse_reward("own_cli_rewards:polite")
    (answer,) = [reward.function.ask((Problem("a", "q", "q", "a"), "please"), 5.0)]
    assert answer == 1.0
    reward.function.worker.close()
    assert parse_reward("own_cli_rewards:asked").function.__name__ == "asked"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--rewards has an empty entry. Write module:function"),
        ("polite", "names no reward. Write module:function"),
        ("no_such_module:f", "--rewards: there is no module 'no_such_module' here"),
        ("own_cli_rewards:polit", "own_cli_rewards has no 'polit'. Did you mean 'polite'"),
        ("own_cli_rewards:trl_style", r"Wrap it: trl_reward\(trl_style\); on the command line trl:module:function"),
        ("own_cli_rewards:no_reward", r"a reward is called as f\(problem, text\), but no_reward takes \(\)"),
        ("matchs('a')", "there is no reward 'matchs'. Did you mean 'matches'"),
        ("overlong(200)", r"missing a required argument: 'buffer'. It is overlong\(limit: int, buffer: int\)"),
        ("overlong(limit=5, buffer=9)", "overlong needs limit >= 1 and 0 <= buffer <= limit"),
        ("matches('(')", "matches needs a regular expression"),
        ("matches(__import__('os'))", "is not a call with literals"),
        ("a.b=own_cli_rewards:polite", "--rewards"),
    ],
)
def test_a_mistake_is_told(text, message):
    with pytest.raises(UserError, match=message):
        parse_reward(text)

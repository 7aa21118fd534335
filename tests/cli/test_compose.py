"""--credit: names, printed compositions, the user's own."""

import pytest

from apportion import Rollouts, credit
from apportion.cli._compose import COMBINATORS, dialects_of, exported, kind_of, parse_credit, short
from apportion.cli._errors import UserError

ESTIMATORS = [name for name in exported() if kind_of(name) == "estimator"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_printed_can_be_typed_back(name):
    made = parse_credit(name)
    assert made == getattr(credit, name)()
    assert parse_credit(repr(made)) == made
    assert repr(parse_credit(repr(made))) == repr(made)


@pytest.mark.parametrize(
    "text",
    [
        "chain(signed_outcome(), scale_by_sign(positive=0.1))",
        "chain(group_relative(scale=None), clip(limit=2.0), whiten())",
        "add((1.0, grpo()), (-0.5, capo(penalty=0.5)))",
        "partition({'step': grpo()})",
        "group_relative(scale='leave_one_out_std', singleton='raw')",
    ],
)
def test_compositions(text):
    made = parse_credit(text)
    assert made == eval(text, vars(credit))
    assert parse_credit(repr(made)) == made


def test_everything_exported_has_a_kind():
    kinds = {name: kind_of(name) for name in exported()}
    assert {name for name, kind in kinds.items() if kind == "combinator"} == set(COMBINATORS)
    transforms = {name for name in credit.__all__ if getattr(getattr(credit, name), "role", None) == "transform"}
    assert {name for name, kind in kinds.items() if kind == "transform"} == transforms
    assert {"grpo", "capo", "pure", "tempo", "nsr", "gae", "rloo"} <= set(ESTIMATORS)


DIALECTS = [f"{name}.{dialect}()" for name, f in exported().items() for dialect in dialects_of(f)]


@pytest.mark.parametrize(
    "text", [*DIALECTS, "group_relative.trl(scale_rewards='batch')", "rloo.trl(normalize_advantages=True)"]
)
def test_dialects_are_written_and_read_back(text):
    made = parse_credit(text)
    assert isinstance(made, credit.Estimator)
    assert parse_credit(repr(made)) == made


def test_the_short_name_of_a_printed_composition():
    assert short(repr(credit.capo())) == "capo"
    assert short(repr(credit.capo(penalty=3.0))) == repr(credit.capo(penalty=3.0))
    assert short("my_module:mine") == "my_module:mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cappo", "there is no credit method 'cappo'. Did you mean 'capo'?"),
        ("chain(grpo(), clup())", "there is no credit method 'clup'. Did you mean 'clip'?"),
        ("capo(penlty=1.0)", "capo has no setting 'penlty'. Did you mean 'penalty'?"),
        ("clip", "is a transform: it changes credit that an estimator made. Write chain(grpo(), ...)"),
        ("chain", "--credit chain"),
        ("", "is not a name or a composition"),
        ("grpo(", "is not a name or a composition"),
        ("grpo.nothing()", "grpo has no variant 'nothing'"),
        ("Estimator", "there is no credit method 'Estimator'"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here' here or on PYTHONPATH"),
        ("apportion.credit:capoo", "apportion.credit has no 'capoo'. Did you mean 'capo'?"),
        ("apportion.credit:clip", "Give an estimator"),
        ("math:pi", "is a float. Give an estimator, a function that returns one"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError) as caught:
        parse_credit(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch pwned')",
        "grpo.__globals__['os']",
        "grpo.__wrapped__()",
        "capo.__class__()",
        "(lambda: grpo())()",
        "[grpo() for _ in range(9)]",
        "capo(penalty=9**9**9)",
        "capo(penalty=open('x'))",
        "capo(**{'penalty': 1.0})",
        "chain(*[grpo()])",
        "grpo() if True else capo()",
        "f'{grpo()}'",
        "capo(penalty=(x := 1.0))",
        "capo(penalty=--1.0)",
        "partition({**{}})",
        "grpo()\nimport os",
        "1",
        "'grpo'",
        "b'grpo'",
        "...",
    ],
)
def test_nothing_is_evaluated_but_exported_names_and_literals(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        parse_credit(text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["(" * 1000, "-" * 3999 + "1", "grpo(" * 500 + ")" * 500, "chain(" * 30 + ")" * 30])
def test_deep_and_long_texts_are_refused(text):
    with pytest.raises(UserError):
        parse_credit(text)
    with pytest.raises(UserError, match="is 4001 characters long; at most 4000 are read"):
        parse_credit("x" * 4001)


OWN = """
import torch
from apportion import Credit
from apportion.credit import capo, estimator

ready = capo(penalty=3.0)

def make():
    return capo(penalty=2.0)

def plain(rollouts):
    return Credit(torch.where(rollouts.action_mask, 1.0, 0.0), rollouts.action_mask)

@estimator()
def decorated(rollouts, *, weight: float = 2.0):
    return Credit(torch.where(rollouts.action_mask, weight, 0.0), rollouts.action_mask)

def broken():
    raise KeyError("my own bug")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    import sys

    (tmp_path / "own_credit_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_credit_module"
    sys.modules.pop("own_credit_module", None)


def test_the_users_own(own_module):
    batch = Rollouts.from_lists([[1, 2]], [0])
    assert parse_credit(f"{own_module}:ready") == credit.capo(penalty=3.0)
    assert parse_credit(f"{own_module}:make") == credit.capo(penalty=2.0)
    for name, value in (("plain", 1.0), ("decorated", 2.0)):
        made = parse_credit(f"{own_module}:{name}")
        assert repr(made) == f"{own_module}:{name}"  # what run.json says can be typed back
        assert made(batch).advantages.max() == value
        assert made.scope in ("row", "batch")


def test_a_bug_in_the_users_own_code_is_not_hidden(own_module):
    with pytest.raises(KeyError, match="my own bug"):
        parse_credit(f"{own_module}:broken")

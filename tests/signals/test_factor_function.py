import textwrap

import pytest
import torch

from apportion.signals import FactorFunction

STATES, ACTIONS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[0.5], [1.0], [2.0]])


def made(body: str, **limits) -> FactorFunction:
    return FactorFunction("def factors(states, actions):\n" + textwrap.indent(textwrap.dedent(body), "    "), **limits)


def test_factors_are_columns():
    function = made(
        """
        import numpy as np
        import math
        from numpy import abs as size
        speed = np.sqrt((states ** 2).sum(1, keepdims=True))
        return [speed, size(actions) * math.pi, states[:, :1].mean() * np.ones((len(states), 1))]
        """
    )
    assert function.problem(STATES, ACTIONS) is None
    got = function(STATES, ACTIONS)
    want = torch.cat([STATES.norm(dim=1, keepdim=True), ACTIONS * torch.pi, torch.full((3, 1), 3.0)], 1).double()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert got.shape == (3, 3)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            "return [states[:, 0]]",
            r"factor 0 must be an array of shape \(batch, 1\) = \(3, 1\); got an array of shape \(3,\)",
        ),
        ("return [actions, states]", r"factor 1 must be .* got an array of shape \(3, 2\)"),
        ("return [actions[:2]]", r"got an array of shape \(2, 1\)"),
        ("return [1.0]", "got float"),
        ("return actions", "must return a list of arrays, one per factor; got ndarray"),
        ("return []", "must return a list of arrays"),
        ("return [np.log(-actions)]", "factor 0 is NaN or infinite"),
        ("return [actions / 0.0]", "factor 0 is NaN or infinite"),
        ("return [speed]", "NameError: name 'speed' is not defined"),
        ("raise ValueError('no such state')", "ValueError: no such state"),
        ("return [actions", "SyntaxError"),
    ],
)
def test_what_is_wrong_is_said(body, text):
    function = made(body)
    problem = function.problem(STATES, ACTIONS)
    assert problem is not None
    with pytest.raises(ValueError, match=text):
        function(STATES, ACTIONS)


def test_without_a_function_of_the_name():
    assert "must define a function factors" in FactorFunction("x = 1").problem(STATES, ACTIONS)
    assert "must define a function factors" in FactorFunction("factors = 1").problem(STATES, ACTIONS)


@pytest.mark.parametrize(
    "body",
    [
        "import os",
        "from os import system",
        "import numpy.ctypeslib",
        "open('x', 'w')",
        "__import__('os')",
        "states.__class__",
        "().__class__.__base__.__subclasses__()",
        "(lambda: 0).__globals__",
        "from math import __dict__ as d",
        "(x for x in [1]).gi_frame",
        "states.tofile('x')",
        "np.load('x')",
        "'{0.__class__}'.format(states)",
        "getattr(states, 'tofile')('x')",
        "eval('1')",
        "match states:\n    case float(__class__=c):\n        pass",
    ],
)
def test_what_reaches_out_is_refused(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = made(body + "\nreturn [actions]")
    problem = function.problem(STATES, ACTIONS)
    assert problem is not None
    assert any(word in problem for word in ("may not", "may import", "not defined", "has no attribute", "not found"))
    assert not list(tmp_path.iterdir())


def test_limits_and_life_after_them():
    slow = made("while True:\n    pass", seconds=0.3)
    assert slow.problem(STATES, ACTIONS) == "it took too long"
    large = made("return [np.zeros((len(states), 1)) + np.zeros(10 ** 9).sum()]", memory=1 << 26)
    assert large.problem(STATES, ACTIONS) is not None
    good = made("return [actions]")
    assert good(STATES, ACTIONS).tolist() == ACTIONS.tolist()
    assert good([[1.0]], [[2.0]]).tolist() == [[2.0]]  # a second call, of another size
    good.close()
    assert good(STATES, ACTIONS).shape == (3, 1)
    wide = made("return [actions] * 1000", output=1000)
    assert wide.problem(STATES, ACTIONS) == "it returned too much"


def test_what_it_keeps_from_one_call_to_the_next_is_nothing():
    function = FactorFunction(
        "seen = []\ndef factors(states, actions):\n    seen.append(1)\n    return [actions * 0 + len(seen)]"
    )
    assert [function([[0.0]], [[0.0]]).item() for _ in range(3)] == [1.0, 1.0, 1.0]

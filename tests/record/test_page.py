"""docs/record.md: its examples run, and its tables name what there is."""

import json
import re
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from apportion.cli.main import main
from apportion.record import read_jsonl
from apportion.record._jsonl import _CREDIT, _KNOWN

PAGE = (Path(__file__).parents[2] / "docs" / "record.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})
    return tmp_path / "runs" / "example"


def test_the_duckdb_example(example):
    """The Python example wrote the run; the query gives the rows that the page prints."""
    rows = duckdb.sql(blocks("sql")[0]).fetchall()
    assert "\n".join(map(str, rows)) + "\n" == blocks("text")[0]


def test_steps_with_different_signals_are_read_together(example):
    from apportion.record import Run, RunWriter

    rollouts = Run(example).rollouts(0)
    RunWriter.resume(example).append(1, rollouts.with_signals(other=rollouts.signals["outcome"]))
    query = re.search(r"`(read_parquet\(.*?\))`", PAGE)[1]
    assert duckdb.sql(f"SELECT count(*), count(signals.other) FROM {query}").fetchall() == [(6, 3)]


def test_every_column_is_on_the_page(example):
    for name in pq.read_schema(example / "rollouts/step-000000.parquet").names:
        assert f"`{name}" in PAGE


def test_every_key_of_the_schema_is_on_the_page():
    for name in _KNOWN | _CREDIT:
        assert f"`{name}`" in PAGE


def test_the_example_log(tmp_path, monkeypatch, capsys):
    """By majority the first step of the second answer is wrong, and it gets the least credit."""
    monkeypatch.chdir(tmp_path)
    Path("log.jsonl").write_text(blocks("jsonl")[0])
    rollouts = read_jsonl("log.jsonl")
    assert rollouts.signals["judge"].values.shape == (4, 3)
    assert rollouts.meta["note"] == [None, "kept in meta"]
    command = re.search(r'\$ apportion credit log.jsonl --credit "(.*)" --out credit.jsonl', blocks("console")[0])
    assert main(["credit", "log.jsonl", "--credit", command[1], "--out", "credit.jsonl"]) == 0
    good, bad = (json.loads(line) for line in Path("credit.jsonl").read_text().splitlines())
    assert max(bad["advantages"][:3]) < min(bad["advantages"][3:]) < min(good["advantages"])
    assert read_jsonl("credit.jsonl").meta.keys() == rollouts.meta.keys()

"""The benchmark compares like with like: our credit and verl's agree on its batch, pair by pair."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "credit.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("credit_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pair_gives_the_same_credit(bench):
    options = argparse.Namespace(only=[], tempo=None, pure=None, gigpo=None, seed=0)
    batch = bench.made(2000)
    pairs = bench.peers(options, batch, 2000)
    assert len(pairs) == 9
    for pair in pairs:
        ours = pair["ours"](pair["batch"])
        gap = torch.where(ours.mask, (ours.advantages - pair["theirs"]()).abs(), 0.0)
        assert gap.max() < 2e-5, pair["peer"]

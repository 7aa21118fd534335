"""The judge against `transformers serve`, a real server with a real (tiny, untrained) language model."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from apportion.signals import JudgeError, LLMJudge
from apportion.types import Rollouts


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    """The server's address and two models of equal weights: one samples, one is greedy whatever it is asked."""
    folder = tmp_path_factory.mktemp("serve")
    models = [_variant(tiny_model, folder / name, name == "sampling") for name in ("sampling", "greedy")]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "empty"), "OMP_NUM_THREADS": "1"}
    program = [str(Path(sys.executable).parent / "transformers"), "serve", "--device", "cpu"]
    with (folder / "log").open("w") as log:
        command = [*program, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, env=os.environ | offline, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", *models
    finally:
        process.kill()
        process.wait()


def _variant(model, folder, do_sample):
    shutil.copytree(model, folder)
    for name, change in (
        ("config.json", {"max_position_embeddings": 8192}),
        ("generation_config.json", {"do_sample": do_sample}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    return str(folder)


def _wait_for(url, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def two_steps():
    meta = {"pieces": [["7+5=12\n", "12-3=8"]], "question": ["7+5-3=?"], "answer": ["9"]}
    return Rollouts.from_lists([[1, 2]], [0], steps=[[(0, 1), (1, 2)]], meta=meta)


def test_replies_of_an_untrained_model_are_unusable_and_counted(served):
    url, sampling, _ = served
    judge = LLMJudge(sampling, url, critiques=3, max_tokens=24)
    judge.check()
    with pytest.warns(RuntimeWarning, match="no usable critique out of 3"):
        values = judge.measure(two_steps())["judge"].values
    assert values.shape == (2, 3)
    assert values.isnan().all()
    report = judge.report()
    assert (report["unusable"], report["failed"], report["calls"], report["identical"]) == (3, 0, 3, 0)
    assert report["completion_tokens"] > 0


def test_a_model_without_do_sample_gives_one_reply_k_times_which_is_an_error(served):
    url, _, greedy = served
    with pytest.raises(JudgeError, match=r"got 3 identical replies .*do_sample"):
        LLMJudge(greedy, url, critiques=3, max_tokens=24).check()
    with pytest.raises(JudgeError, match=r"got 3 identical replies .*do_sample"):
        LLMJudge(greedy, url, critiques=3, max_tokens=24).measure(two_steps())


def test_one_critique_of_a_greedy_model_is_fine(served):
    url, _, greedy = served
    LLMJudge(greedy, url, critiques=1, temperature=0, max_tokens=24).check()


def test_do_sample_may_also_be_sent_with_each_request(served):
    url, _, greedy = served
    sample = {"generation_config": json.dumps({"do_sample": True, "max_new_tokens": 24})}
    LLMJudge(greedy, url, critiques=3, max_tokens=24, extra_body=sample).check()


def test_seeds_make_the_critiques_repeatable(served, tmp_path):
    url, sampling, _ = served

    def replies(seed, folder):
        judge = LLMJudge(sampling, url, critiques=2, max_tokens=24, seed=seed, cache=folder, concurrency=1)
        with pytest.warns(RuntimeWarning):
            judge.measure(two_steps())
        return sorted(json.loads(p.read_bytes())["reply"] for p in folder.rglob("*.json"))

    once, again, other = (replies(s, tmp_path / n) for s, n in ((1, "once"), (1, "again"), (7, "other")))
    assert once == again != other


def test_a_model_that_the_server_cannot_load_is_found_before_training(served, tmp_path):
    url, *_ = served
    with pytest.raises(JudgeError, match=r"LLMJudge needs a chat model .*nowhere.* got HTTP \d+"):
        LLMJudge(str(tmp_path / "nowhere"), url, critiques=1, retries=0).check()

"""A run on disk: bit-exact round trips, files that appear whole, kills that leave a readable folder."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apportion import Credit, Rollouts, Signal, Spans
from apportion.record import Run, RunWriter

INFO = {"credit": "capo()", "config": {"lr": 1e-4, "out": Path("x")}, "seed": 3}


def tiny(outcome=(1.0, 0.0)):
    return Rollouts.from_lists(
        [[5, 6, 7], [5, 8]],
        [0, 0],
        outcome=list(outcome),
        steps=[[(1, 3)], [(0, 1), (1, 2)]],
        meta={"text": ["a", "b"]},
    )


def bits(x):
    if x.dtype in (torch.bfloat16, torch.float16):  # stored as float32: which of the many NaNs it was may change
        x = torch.where(torch.isnan(x), torch.full_like(x, float("nan")), x)
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def same(a, b):
    """Equal types, dtypes and bits, all the way down."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(bits(a), bits(b))
    elif hasattr(a, "__dataclass_fields__"):
        assert type(a) is type(b)
        for name in a.__dataclass_fields__:
            same(getattr(a, name), getattr(b, name))
    elif hasattr(a, "items"):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    else:
        assert a == b


# ---- round trip -------------------------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=6).filter(lambda s: "\x00" not in s and s.isprintable())
texts = st.text(max_size=12)
meta_values = st.one_of(
    texts,
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.lists(texts, max_size=3),
    st.dictionaries(texts, st.integers(), max_size=2),
)


@st.composite
def batches(draw):
    rows, width = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    lengths = torch.randint(0, width + 1, (rows,), generator=seed)
    inside = torch.arange(width) < lengths[:, None]
    trajectory_ids = dense(torch.randint(0, 3, (rows,), generator=seed))
    group_ids = dense(trajectory_ids // 2)

    def floats(*shape):
        x = torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype)
        odd = torch.randint(0, 6, shape, generator=seed)
        x[odd == 0], x[odd == 1], x[odd == 2] = float("nan"), -0.0, float("inf")
        return x

    def maybe(make):
        return make() if draw(st.booleans()) else None

    def position():
        x = floats(rows, width)
        return torch.where(inside, x, 0) if draw(st.booleans()) else x

    pieces = torch.randperm(rows, generator=seed)
    spans = {}
    for name in draw(st.lists(names, max_size=2, unique=True)):
        if name in ("batch", "group", "trajectory", "token"):
            continue
        half = torch.div(lengths[pieces], 2, rounding_mode="floor")
        optional = maybe(lambda: torch.randint(0, 9, (rows,), generator=seed))
        spans[name] = Spans(
            pieces, half, lengths[pieces], torch.arange(rows), optional, maybe(lambda: -torch.ones(rows).long())
        )
    rollouts = Rollouts(
        lengths=lengths,
        action_mask=inside & (torch.rand(rows, width, generator=seed) < 0.7),
        group_ids=group_ids,
        trajectory_ids=trajectory_ids,
        row_index=torch.randint(0, 9, (rows,), generator=seed),
        tokens=maybe(lambda: torch.randint(0, 2**40, (rows, width), generator=seed)),
        actions=maybe(lambda: floats(rows, width, 2, 3)),
        truncated=maybe(lambda: torch.rand(rows, generator=seed) < 0.5),
        covers=draw(st.sampled_from(["row", "group", "batch"])),
        logprobs=maybe(position),
        old_logprobs=maybe(position),
        ref_logprobs=maybe(position),
        values=maybe(position),
        bootstrap=maybe(lambda: floats(rows)),
        off_policy=maybe(lambda: torch.rand(rows, generator=seed) < 0.5),
        spans=spans,
        meta={k: draw(st.lists(meta_values, min_size=rows, max_size=rows)) for k in draw(st.lists(names, max_size=3))},
    )

    def signals():
        out = {}
        for name in draw(st.lists(names, max_size=4, unique=True)):
            unit = draw(st.sampled_from(["batch", "group", "trajectory", "token", *spans]))
            inner = draw(st.sampled_from([(), (2,), (2, 3), (0,)]))
            first = (rows, width) if unit == "token" else (rollouts.units(unit),)
            out[name] = Signal(floats(*first, *inner), unit, tuple(f"axis{i}" for i in range(len(inner))))
        return out

    rollouts = rollouts.replace(signals=signals())
    notes = draw(st.dictionaries(names, st.floats(allow_nan=False), max_size=2))
    credit = Credit(position(), rollouts.action_mask, signals(), maybe(position), notes)
    return rollouts, maybe(lambda: credit)


def dense(ids):
    return torch.unique(ids, return_inverse=True)[1]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches(), st.integers(0, 10**7))
def test_every_bit_comes_back(tmp_path_factory, batch, step):
    rollouts, credit = batch
    writer = RunWriter.create(tmp_path_factory.mktemp("run") / "r", INFO)
    writer.append(step, rollouts, credit)
    run = Run(writer.path)
    assert run.steps() == [step]
    same(run.rollouts(step), rollouts)
    if credit is None:
        with pytest.raises(ValueError, match="recorded without credit"):
            run.credit(step)
    else:
        same(run.credit(step), credit)


def test_meta_that_is_not_data_is_refused(tmp_path):
    rollouts = tiny().replace(meta={"image": [object(), 1]})
    with pytest.raises(TypeError, match=r"meta\['image'\] cannot be recorded: .* Keep text, numbers"):
        RunWriter.create(tmp_path / "r", INFO).append(0, rollouts)


def test_lone_surrogates_in_text_come_back(tmp_path):
    writer = RunWriter.create(tmp_path / "r", INFO)
    writer.append(0, tiny().replace(meta={"text": ["\ud800 broken", "fine"]}))
    assert list(Run(tmp_path / "r").rollouts(0).meta["text"]) == ["\ud800 broken", "fine"]


def test_a_foreign_parquet_file_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    RunWriter.create(tmp_path / "r", INFO)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "r/rollouts/step-000000.parquet")
    with pytest.raises(ValueError, match="was not written by apportion"):
        Run(tmp_path / "r").rollouts(0)


# ---- the folder -------------------------------------------------------------------------------------------------------


def test_run_json_says_what_and_with_what(tmp_path):
    RunWriter.create(tmp_path / "r", INFO)
    info = Run(tmp_path / "r").info
    assert info["credit"] == "capo()"
    assert info["seed"] == 3
    assert info["config"] == {"lr": 1e-4, "out": "x"}
    assert info["command"] == sys.argv
    assert info["versions"]["torch"] == torch.__version__


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "precious").write_text("keep")
    with pytest.raises(FileExistsError, match=r"is not empty. Choose a new folder for the run, or resume"):
        RunWriter.create(tmp_path, INFO)
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f" / "run"):
        with pytest.raises(NotADirectoryError, match=r"a file is in the way. Choose another folder"):
            RunWriter.create(path, INFO)


def test_a_folder_that_takes_no_new_files():
    """Nobody can make a folder in /proc, root included; permissions would not stop root."""
    with pytest.raises(OSError, match=r"/proc/self/run cannot be created: .*\. Choose a folder you can write to"):
        RunWriter.create("/proc/self/run", INFO)


def test_a_full_disk_is_told_before_anything_runs(tmp_path):
    """A limit on file size stands for the full disk: the write itself fails, although the folder could be made."""
    code = (
        "import resource, signal, sys; from apportion.record import RunWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: RunWriter.create(sys.argv[1], {})\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True, text=True, check=True)
    assert "cannot be written to: File too large. Free some space, or choose a folder on another disk." in done.stdout
    assert list((tmp_path / "r").iterdir()) == []


def test_the_message_of_a_full_device(tmp_path):
    from apportion.record import _run

    (tmp_path / "probe.tmp").symlink_to("/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    with pytest.raises(OSError, match=r"cannot be written to: No space left on device. Free some space"):
        _run._probe(tmp_path)


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a recorded run: there is no such folder"):
        Run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is not a recorded run: it has no run.json"):
        RunWriter.resume(tmp_path)


def test_a_step_that_is_not_there(tmp_path):
    writer = RunWriter.create(tmp_path / "r", INFO)
    with pytest.raises(ValueError, match="has no rollouts of step 7; none is recorded yet"):
        Run(writer.path).rollouts(7)
    writer.append(2, tiny())
    writer.append(4, tiny())
    with pytest.raises(ValueError, match="has no rollouts of step 7; recorded are 2 to 4"):
        Run(writer.path).rollouts(7)


# ---- metrics, kills and resuming --------------------------------------------------------------------------------


def test_metrics_are_plain_json(tmp_path):
    import numpy as np

    writer = RunWriter.create(tmp_path / "r", INFO)
    writer.metrics(1, "eval", accuracy=torch.tensor(0.5), correct=torch.tensor([1, 0]), n=np.int64(2))
    writer.metrics(1, "train", loss=float("nan"), grad_norm=float("inf"), reward=[0.5, float("nan")])
    assert Run(tmp_path / "r").metrics() == [
        {"step": 1, "kind": "eval", "accuracy": 0.5, "correct": [1, 0], "n": 2},
        {"step": 1, "kind": "train", "loss": None, "grad_norm": None, "reward": [0.5, None]},
    ]
    assert [m["kind"] for m in Run(tmp_path / "r").metrics("train")] == ["train"]


def test_steps_that_are_done_again_replace_what_was_there(tmp_path):
    writer = RunWriter.create(tmp_path / "r", INFO)
    for step in (0, 1):
        writer.append(step, tiny())
        writer.metrics(step, "train", reward=0.0)
    writer = RunWriter.resume(tmp_path / "r")
    writer.append(1, tiny(outcome=(0.25, 0.5)))
    writer.metrics(1, "train", reward=0.375)
    run = Run(tmp_path / "r")
    assert [(m["step"], m["reward"]) for m in run.metrics("train")] == [(0, 0.0), (1, 0.375)]
    assert run.steps() == [0, 1]
    assert run.rollouts(1).signals["outcome"].values.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("tail", ['{"step": 2, "ki', '{"step": 2, "kind": "train", "reward": 0.', "{", "\x00"])
def test_a_half_written_last_line_is_tolerated_and_cut(tmp_path, tail):
    writer = RunWriter.create(tmp_path / "r", INFO)
    writer.metrics(1, "train", reward=0.5)
    with open(tmp_path / "r/metrics.jsonl", "a") as file:
        file.write(tail)
    assert [m["step"] for m in Run(tmp_path / "r").metrics()] == [1]
    RunWriter.resume(tmp_path / "r").metrics(2, "train", reward=1.0)
    lines = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    writer = RunWriter.create(tmp_path / "r", INFO)
    (tmp_path / "r/metrics.jsonl").write_text('{"step": 1, "kind": "train"}')
    assert len(Run(tmp_path / "r").metrics()) == 1
    RunWriter.resume(tmp_path / "r")
    writer.metrics(2, "train")
    assert [m["step"] for m in Run(tmp_path / "r").metrics()] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    RunWriter.create(tmp_path / "r", INFO)
    (tmp_path / "r/metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{oops\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not JSON"):
        Run(tmp_path / "r").metrics()


def test_killed_while_writing_the_folder_still_reads(tmp_path):
    """kill -9 at five moments: every file that exists is whole, and resuming clears what was half done."""
    code = (
        "import sys, itertools; from apportion.record import RunWriter\n"
        "import torch; from apportion import Rollouts, Credit\n"
        "r = Rollouts.from_lists([[1] * 500] * 64, [0] * 64, outcome=[1.0] * 64)\n"
        "c = Credit(torch.rand(64, 500), r.action_mask)\n"
        "w = RunWriter.create(sys.argv[1], {'seed': 0}); print('go', flush=True)\n"
        "for i in itertools.count(): w.append(i % 3, r, c); w.metrics(i, 'train', x=1.0)"
    )
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"go\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.05 + 0.013 * attempt)
        child.kill()
        child.communicate()
        run = Run(folder)
        for step in run.steps():
            assert run.rollouts(step).batch == 64
            assert run.credit(step).advantages.shape == (64, 500)
        run.metrics()
        RunWriter.resume(folder)
        assert not list(folder.rglob("*.tmp"))

import pytest
import torch

from apportion import (
    Credit,
    Rollouts,
    Signal,
    assemble,
    capo,
    clip,
    estimator,
    gae,
    group_relative,
    grpo,
    process_penalty,
    transform,
)


def two(**more) -> Rollouts:
    return Rollouts.from_lists([[1], [2]], [0, 0], outcome=[1.0, 0.0], **more)


def test_binding_and_running_agree():
    bound = group_relative(scale=None)
    assert repr(bound) == "group_relative(scale=None)"
    assert (bound(two()).advantages == group_relative(two(), scale=None).advantages).all()
    assert (capo()(judged()).advantages == capo(judged()).advantages).all()


def judged() -> Rollouts:
    return two(steps=[[(0, 1)], [(0, 1)]], judge=[[[0.0]], [[1.0]]])


def test_equal_means_computes_the_same():
    assert group_relative() == group_relative(scale="std", eps=1e-6)
    assert process_penalty(penalty=1) == process_penalty(penalty=1.0)
    assert group_relative(scale=None) != group_relative()
    assert len({grpo(), grpo(), grpo(eps=0.0)}) == 2


def test_a_misspelt_setting_is_answered_with_the_right_one():
    with pytest.raises(TypeError, match=r"group_relative has no setting 'scales'\. Did you mean 'scale'\?"):
        group_relative(scales=None)
    with pytest.raises(TypeError, match=r"capo has no setting 'penality'\. Did you mean 'penalty'\?"):
        capo(penality=1.0)
    with pytest.raises(TypeError, match=r"clip has no setting 'zzz'\. Choose from: 'limit'\."):
        clip(zzz=1)


def test_a_wrong_value_is_answered_with_the_choices():
    with pytest.raises(ValueError, match=r"baseline to be 'mean' or 'leave_one_out' or .* 'none'; got 'meen'\. Did"):
        group_relative(baseline="meen")
    with pytest.raises(TypeError, match="group_relative needs eps to be float; got '1'"):
        group_relative(eps="1")
    with pytest.raises(ValueError, match="clip needs a finite limit; got inf"):
        clip(limit=float("inf"))
    with pytest.raises(TypeError, match=r"needs ddof to be int; got 0\.5"):
        group_relative(ddof=0.5)


def test_positional_settings_are_refused():
    with pytest.raises(TypeError, match="takes Rollouts or nothing, then settings by name; got float"):
        grpo(0.5)
    with pytest.raises(TypeError, match="takes Credit, Rollouts or nothing, then settings by name; got Rollouts"):
        clip(two())


def test_a_missing_field_is_named_with_its_cure():
    r = two(steps=[[(0, 1)], [(0, 1)]])
    with pytest.raises(ValueError) as error:
        process_penalty(r)
    assert str(error.value) == (
        'process_penalty needs rollouts.signals["judge"], which this batch lacks (it has outcome). '
        "Measure it first: rollouts.with_signals(judge=...)."
    )
    with pytest.raises(ValueError, match=r'gae needs rollouts\.spans\["turn"\], which this batch lacks\. Split'):
        gae(two(values=[[0.0], [0.0]]), over="turn")
    with pytest.raises(ValueError, match=r"needs rollouts\.ref_logprobs, which this batch lacks\. Keep a reference"):
        gae(two(values=[[0.0], [0.0]], logprobs=[[0.0], [0.0]]), kl_coef=0.1)


def test_a_slice_that_shows_too_little_is_refused():
    with pytest.raises(ValueError) as error:
        grpo(two().replace(covers="row"))
    assert str(error.value) == (
        "group_relative compares within the group, but this slice covers only the row. "
        "Compute the credit before slicing, or give whole groups."
    )
    assert grpo(two().replace(covers="group")).advantages.abs().sum() > 0
    with pytest.raises(ValueError, match="within the batch, but this slice covers only the group"):
        group_relative(two().replace(covers="group"), scale="batch_std")


def test_output_dtype_follows_the_floats_that_are_read():
    wide, narrow = two(dtype=torch.float64, values=[[0.0], [0.0]]), two(values=[[0.0], [0.0]])
    assert grpo(wide).advantages.dtype == torch.float64
    assert gae(wide).returns.dtype == torch.float64
    assert grpo(narrow).advantages.dtype == torch.float32
    assert gae(wide.replace(values=narrow.values)).advantages.dtype == torch.float32
    assert grpo(wide.replace(values=narrow.values)).advantages.dtype == torch.float64, "values are not read"
    half = narrow.with_signals(outcome=Signal(narrow.signals["outcome"].values.bfloat16(), "trajectory"))
    assert grpo(half).advantages.dtype == torch.float32


def test_a_new_method_in_ten_lines():
    @estimator(requires=("signals.{reward}",))
    def shouted(rollouts: Rollouts, *, reward: str = "outcome", weight: float = 2.0) -> Credit:
        value = rollouts.signals[reward].values.double()
        return assemble(rollouts, rollouts.action_mask, {reward: Signal(weight * value, "trajectory")})

    @transform()
    def negate(credit: Credit, rollouts: Rollouts) -> Credit:
        return credit.scaled(-1.0, rollouts)

    assert shouted(two()).advantages[:, 0].tolist() == [2.0, 0.0]
    assert negate(shouted(two()), two()).advantages[0] == -2.0
    assert shouted().requires == ("signals.outcome",)
    with pytest.raises(TypeError, match=r"negate has no setting 'x'\. It takes none\."):
        negate(x=1)

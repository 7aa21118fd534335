import apportion
from apportion import credit

NAMES = [
    "Estimator",
    "Transform",
    "add",
    "alias",
    "assemble",
    "capo",
    "chain",
    "clip",
    "dr_grpo",
    "estimator",
    "gae",
    "group_relative",
    "grpo",
    "nsr",
    "partition",
    "prefix_td",
    "process_min",
    "process_penalty",
    "psr",
    "pure",
    "rloo",
    "scale_by_sign",
    "signed_outcome",
    "tempo",
    "transform",
    "w_reinforce",
    "whiten",
]


def test_the_public_list():
    assert sorted(credit.__all__) == sorted(NAMES)
    assert set(NAMES) < set(apportion.__all__)
    assert list(credit.__all__) == sorted(credit.__all__)


def test_every_method_says_where_it_comes_from():
    for name in NAMES:
        if hasattr(getattr(credit, name), "role"):
            assert "Source:" in getattr(credit, name).__doc__, name

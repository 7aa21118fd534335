import torch
from torch.nn.functional import cosine_similarity

from apportion.functional import contrast_reward, early_stop

F64 = torch.float64


def test_contrast_rewards_of_the_worked_pair():
    better = torch.tensor([-0.4, -0.9, -1.1, -1.5, -2.2], dtype=F64)
    worse = torch.tensor([-1.4, -0.6, -1.1, -0.5, -1.0], dtype=F64)
    want = torch.tensor([0.231059, -0.074443, 0.0, -0.231059, -0.268525], dtype=F64)
    torch.testing.assert_close(contrast_reward(better - worse), want, rtol=0, atol=5.1e-7)


def test_contrast_rewards_are_bounded():
    for dtype in (F64, torch.float32):
        assert contrast_reward(torch.tensor([1e4, -1e4], dtype=dtype)).tolist() == [0.5, -0.5]


def test_the_worked_trajectory_stops_at_its_third_token():
    states = torch.tensor([[1.0, 0.2], [0.8, 0.6], [-0.1, 1.0], [0.5, 0.5]], dtype=F64)
    values = cosine_similarity(states, torch.tensor([[1.0, 0.5]], dtype=F64))
    want = torch.tensor([0.964764, 0.983870, 0.355995, 0.948683], dtype=F64)
    torch.testing.assert_close(values, want, rtol=0, atol=5.1e-7)
    length = torch.tensor([4])
    stop = early_stop(values[None], length, threshold=0.4, skip=0)
    assert stop.tolist() == [2]
    assert (length - stop).tolist() == [2]


def test_first_tokens_padding_and_the_unmeasured_stop_nothing():
    values = torch.tensor([[0.1, 0.9, 0.1], [0.1, 0.9, 0.1], [0.9, float("nan"), 0.9]])
    lengths = torch.tensor([3, 2, 3])
    assert early_stop(values, lengths, threshold=0.5, skip=1).tolist() == [2, 2, 3]
    assert early_stop(values, lengths, threshold=0.5).tolist() == [3, 2, 3]
    assert early_stop(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), threshold=0.5).tolist() == [0, 0]

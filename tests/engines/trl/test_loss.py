"""Our loss beside TRL's own `_compute_loss` on the same tensors, with gradients: objectives, ratios, corrections, KL.

The model's scores are replaced by numbers drawn here; everything else that TRL does between sampling and loss is its own.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion import Credit, Rollouts
from apportion.losses import KLToReference, Outputs, PolicyGradient, add_losses, totals_of

# TRL sets an option that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
LENGTHS = [5, 2, 4, 1]
WIDTH = max(LENGTHS)


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    import trl
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("loss")),
        use_cpu=True,
        bf16=False,
        beta=0.0,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=WIDTH,
        report_to="none",
        disable_tqdm=True,
    )
    made = trl.GRPOTrainer(
        model=tiny_model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["ab"]}),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = made.args.steps_per_generation = 1
    return made


def drawn(seed: int, spread: float) -> SimpleNamespace:
    """Log-probabilities of four responses: the sampler's, the learner's before and in the update, the reference's."""
    g = torch.Generator().manual_seed(seed)

    def moved(x: Tensor, by: float) -> Tensor:
        return x + by * torch.randn(4, WIDTH, generator=g)

    sampled = -0.2 - 2 * torch.rand(4, WIDTH, generator=g)
    old = moved(sampled, spread)
    made = SimpleNamespace(sampled=sampled, old=old, new=moved(old, spread), ref=moved(old, spread))
    made.advantages = torch.randn(4, generator=g)
    return made


def theirs(trainer: Any, monkeypatch: Any, d: SimpleNamespace, mode: str | None, **settings: Any) -> tuple:
    """TRL's loss and its gradient at the learner's log-probabilities."""
    args = ("delta", "use_bias_correction_kl")
    for name, value in settings.items():
        monkeypatch.setattr(trainer.args if name in args else trainer, name, value)
    monkeypatch.setattr(trainer, "use_vllm", mode is not None)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_mode", mode)
    ids = [[5] * n for n in LENGTHS]
    logprobs = [row[:n].tolist() for row, n in zip(d.sampled, LENGTHS, strict=True)]
    monkeypatch.setattr(trainer, "_generate", lambda _: ([[1]] * 4, ids, None, ["x"] * 4, logprobs, {}, None, None))
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (d.old, None, None))
    inputs = trainer._generate_and_score_completions([{"prompt": "ab"}] * 4)
    inputs |= {"advantages": d.advantages, "old_per_token_logps": d.old, "ref_per_token_logps": d.ref}
    new = d.new.clone().requires_grad_()
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (new, torch.zeros_like(new), None)
    )
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss.item(), torch.autograd.grad(loss, new)[0]


def ours(d: SimpleNamespace, *terms: Any) -> tuple:
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    r = Rollouts.from_lists([[5] * n for n in LENGTHS], [0] * 4)
    r = r.replace(old_logprobs=d.old, logprobs=d.sampled, ref_logprobs=d.ref)
    credit = Credit(torch.where(mask, d.advantages[:, None], 0.0), mask)
    new = d.new.clone().requires_grad_()
    loss, _ = add_losses(*terms)(Outputs(new), r, credit, totals_of(r, credit))
    return loss.item(), torch.autograd.grad(loss, new)[0]


def same(got: tuple, want: tuple) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-7)


CASES = {
    "clip": ({"loss_type": "dapo"}, {}),
    "mean of row means": ({"loss_type": "grpo"}, {"aggregation": "sequence_mean_token_mean"}),
    "sequence ratio": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"aggregation": "sequence_mean_token_mean", "ratio": "sequence"},
    ),
    "dual clip": ({"loss_type": "dapo", "delta": 1.5}, {"dual_clip": 1.5}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, {"objective": "cispo", "clip_high": 0.3}),
    "cispo of rows": (
        {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
        {"objective": "cispo", "clip_high": 0.1, "ratio": "sequence"},
    ),
}


@pytest.mark.parametrize("mode", [None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("case", CASES)
def test_objectives_and_corrections(trainer, monkeypatch, case, mode):
    options, settings = CASES[case]
    moved = False
    for seed in range(4):
        d = drawn(seed, 0.5)
        correction = {} if mode is None else {"correction": mode, "correction_cap": 1.4}
        want = theirs(
            trainer,
            monkeypatch,
            d,
            mode,
            epsilon_low=0.2,
            vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=1.4,
            **{"epsilon_high": 0.28, **options},
        )
        same(ours(d, PolicyGradient(**settings, **correction)), want)
        moved |= bool(want[1].any())
    assert moved


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("mode", [None, "token_truncate"])
def test_the_penalty(trainer, monkeypatch, mode, weighed):
    """TRL weighs beta times k3 by rho, unless told otherwise, and never by the correction."""
    d = drawn(7, 0.4)
    monkeypatch.setattr(trainer, "ref_model", trainer.model)
    options = {"beta": 0.05, "use_bias_correction_kl": weighed, "epsilon_low": 0.2, "epsilon_high": 0.28}
    cap = {"vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": 1.4}
    want = theirs(trainer, monkeypatch, d, mode, loss_type="dapo", **options, **cap)
    policy = PolicyGradient(correction=mode or "none", correction_cap=1.4)
    same(ours(d, policy, KLToReference(coef=0.05, weighed=weighed)), want)

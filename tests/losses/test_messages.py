"""What a wrong setting is answered with. Not run under the type checker, which would speak first."""

import pytest
import torch

from apportion.losses import (
    HintedPolicyGradient,
    KLToReference,
    PolicyGradient,
    ValueLoss,
    add_losses,
    t_reg_loss,
)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PolicyGradient(aggregation="mean"), "aggregation must be one of token_mean, .*; got 'mean'"),
        (lambda: PolicyGradient(aggregation="token_sum_norm"), "needs a positive horizon; got None"),
        (
            lambda: PolicyGradient(ratio="trajectory"),
            "ratio must be 'token', 'sequence' or the name of a span set; got 'trajectory'",
        ),
        (lambda: PolicyGradient(clip_low=-0.1), "clip_low must be at least 0; got -0.1"),
        (lambda: PolicyGradient(dual_clip=1.0), "dual_clip must be greater than 1; got 1.0"),
        (lambda: PolicyGradient(objective="ppo"), "objective must be 'clip' or 'cispo'; got 'ppo'"),
        (
            lambda: PolicyGradient(objective="cispo", dual_clip=3.0),
            r"objective='cispo' bounds every weight .* so that dual_clip=3.0 has nothing to bound. Leave one of the two out",
        ),
        (lambda: PolicyGradient(correction="token"), "correction must be one of none, token_truncate, .*; got 'token'"),
        (
            lambda: PolicyGradient(correction="token_mask", correction_cap=0.5),
            "correction_cap must be at least 1, the weight where learner and sampler agree; got 0.5",
        ),
        (lambda: KLToReference(coef=0.1, estimator="mse"), "estimator must be one of k1, k2, k3, abs; got 'mse'"),
        (lambda: ValueLoss(clip=-1.0), "clip must be at least 0; got -1.0"),
        (
            lambda: HintedPolicyGradient(shaping="mean"),
            "shaping must be 'percentile', 'constant' or 'power'; got 'mean'",
        ),
        (lambda: HintedPolicyGradient(aggregation="mean"), "aggregation must be one of token_mean"),
        (lambda: t_reg_loss(*[torch.zeros(2, 1)] * 6, form="ipo"), "form 'dpo' or 'simpo'; got 'ipo'"),
        (lambda: add_losses(), "at least one term"),
        (lambda: add_losses(ValueLoss(), ValueLoss()), "2 terms of kind ValueLoss"),
    ],
)
def test_wrong_settings(make, text):
    with pytest.raises(ValueError, match=text):
        make()

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
        (lambda: KLToReference(coef=0.1, estimator="k2"), "estimator must be 'k3' or 'k1'; got 'k2'"),
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

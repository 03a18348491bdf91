"""Coefficients without a clip bound near w = 1, which re-weight samples instead."""

from typing import Annotated

import torch as th

from sb3_klip.coefficients.parameters import Fraction, Interval, NonNegative, Positive, constant_like
from sb3_klip.coefficients.registry import register


@register(
    "none",
    formula="0; with ratio_deviation, the epochs of an update end when the mean of |w - 1| exceeds it",
    source="ESPO, arXiv 2202.00079, with ratio_deviation 0.25",
    espo={"ratio_deviation": 0.25},
)
class Unclipped:
    """
    The importance-weighted surrogate without a trust region; with ``ratio_deviation``, updates stop early.

    :param ratio_deviation: bound on the mean of ``|w - 1|`` over a minibatch; None for no early stopping
    """

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | th.Tensor,
        *,
        ratio_deviation: Positive | None = None,
    ) -> th.Tensor:
        """
        Removal of each sample.

        :param ratio: importance ratio w
        :param advantages: not used
        :param clip_range: not used
        :param ratio_deviation: not used, see :meth:`stop`
        :return: 0
        """
        return th.zeros_like(ratio)

    def stop(self, ratio: th.Tensor, *, ratio_deviation: float | None) -> bool:
        """
        Whether the ratios of a minibatch deviate too far from 1.

        :param ratio: importance ratio w
        :param ratio_deviation: see above
        :return: whether to end the epochs of the update
        """
        return ratio_deviation is not None and (ratio - 1).abs().mean().item() > ratio_deviation


@register("smoothing", "pspo", formula="alpha", source="PSPO, arXiv 2509.21282", search={"alpha": (0.01, 0.5)})
def smoothing(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, alpha: Fraction = 0.1) -> th.Tensor:
    """
    The ratio replaced by (1 - alpha) w + alpha.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param alpha: share of the gradient that is removed from every sample
    :return: removal
    """
    return constant_like(alpha, ratio)


@register(
    "soft_adaptive",
    "sapo",
    formula="1 - 4 p (1 - p), p = σ(tau (w - 1)), tau_pos where Â > 0 and tau_neg elsewhere",
    source="SAPO, arXiv 2511.20347",
    search={"tau_pos": (0.3, 10.0), "tau_neg": (0.3, 10.0)},
)
def soft_adaptive(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    tau_pos: Positive = 1.0,
    tau_neg: Positive = 1.05,
) -> th.Tensor:
    """
    The gradient of (4/τ) σ(τ(w - 1)) Â: unchanged at w = 1, and decaying to zero on both sides.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param tau_pos: τ where Â > 0
    :param tau_neg: τ where Â <= 0
    :return: removal
    """
    temperature = th.where(advantages > 0, constant_like(tau_pos, ratio), constant_like(tau_neg, ratio))
    # 1 - 4p(1 - p) is tanh² of half the argument, without the loss of digits near w = 1
    return th.tanh(temperature * (ratio - 1) / 2).square()


soft_adaptive.needs_policy_ratio = True  # type: ignore[attr-defined]


def removal_of(multiplier: th.Tensor, ratio: th.Tensor) -> th.Tensor:
    """
    The removal that replaces w by ``multiplier``: ``1 - m / w``, so that m multiplies ``Â ∇log π(a|s)``.

    The removal is finite: a ratio that underflows to 0 counts as the smallest positive number of its dtype. For large w, a
    bounded m loses digits in ``1 - g``: in single precision, the error is about 1e-7 w. With an infinite ratio, g is 1.

    :param multiplier: m, at most 1 where the ratio underflows; a tensor like the ratio, as a number divided by a tensor rounds
        differently
    :param ratio: importance ratio w
    :return: removal, exactly 0 where m = w
    """
    return 1 - multiplier / ratio.clamp(min=th.finfo(ratio.dtype).tiny)


@register(
    "truncated",
    "cispo",
    formula="1 - clamp(w, 1 - low, 1 + high) / w",
    source="CISPO, arXiv 2506.13585, which gives no number for high; the default is from arXiv 2510.13786",
    search={"high": (0.1, 10.0)},
)
def truncated(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    low: Fraction = 1.0,
    high: NonNegative = 4.0,
) -> th.Tensor:
    """
    REINFORCE with a truncated importance ratio: no sample is dropped, and no weight is larger than 1 + ``high``.

    :param ratio: importance ratio w
    :param advantages: not used
    :param clip_range: not used
    :param low: the ratio counts as at least 1 - ``low``
    :param high: the ratio counts as at most 1 + ``high``
    :return: removal
    """
    multiplier = ratio.clamp(1 - low, 1 + high)
    return removal_of(multiplier, ratio).masked_fill(multiplier == ratio, 0.0)  # also where both are 0


truncated.needs_policy_ratio = True  # type: ignore[attr-defined]


@register(
    "tapered",
    "topr",
    formula="1 - 1 / w where Â > 0, 1 - clamp(w, 0, 1) / w elsewhere",
    source="TOPR, arXiv 2503.14286, which uses the ratio and the return of a sequence",
    search={},
)
def tapered(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    Without an importance ratio where Â > 0; with the ratio truncated at 1 elsewhere.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :return: removal
    """
    bad = truncated(ratio, advantages, clip_range, low=1.0, high=0.0)
    return th.where(advantages > 0, removal_of(th.ones_like(ratio), ratio), bad)


tapered.needs_policy_ratio = True  # type: ignore[attr-defined]


@register(
    "gamma_weighted",
    "vespo",
    formula="1 - w^(k - 1) exp(lambda (1 - w)), k_pos and lambda_pos where Â > 0, k_neg and lambda_neg elsewhere",
    source="VESPO, arXiv 2602.10693, which uses the ratio of a sequence",
    search={"k_pos": (1.0, 5.0), "lambda_pos": (0.3, 10.0), "k_neg": (1.0, 5.0), "lambda_neg": (0.3, 10.0)},
)
def gamma_weighted(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    k_pos: Annotated[float, Interval(1.0)] = 2.0,
    lambda_pos: NonNegative = 3.0,
    k_neg: Annotated[float, Interval(1.0)] = 3.0,
    lambda_neg: NonNegative = 2.0,
) -> th.Tensor:
    """
    The ratio replaced by ``w^k exp(λ(1 - w))``, a multiple of the density of a gamma distribution, which is 1 at w = 1.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param k_pos: k where Â > 0
    :param lambda_pos: λ where Â > 0
    :param k_neg: k where Â <= 0
    :param lambda_neg: λ where Â <= 0
    :return: removal
    """
    good = advantages > 0
    k = th.where(good, constant_like(k_pos, ratio), constant_like(k_neg, ratio))
    rate = th.where(good, constant_like(lambda_pos, ratio), constant_like(lambda_neg, ratio))
    # As one exponential, as a power that overflows times an exponential that underflows is NaN. xlogy(0, 0) is 0.
    finite = ratio.clamp(max=th.finfo(ratio.dtype).max)
    return -th.expm1(th.xlogy(k - 1, finite) + rate * (1 - finite))


gamma_weighted.needs_policy_ratio = True  # type: ignore[attr-defined]

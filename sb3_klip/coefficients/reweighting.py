"""Coefficients with no bound on the ratio, which weigh every sample in the same way."""

import torch as th

from sb3_klip.coefficients.parameters import Fraction, Positive, constant_like
from sb3_klip.coefficients.registry import register


@register(
    "none",
    formula="0; with ratio_deviation, the epochs end once the mean of |w - 1| exceeds it",
    source="ESPO, arXiv 2202.00079, whose ratio_deviation is 0.25",
    espo={"ratio_deviation": 0.25},
)
class Unclipped:
    """
    The importance-weighted surrogate with no trust region; with ``ratio_deviation``, one that stops early.

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
        """Removal of each sample."""
        return th.zeros_like(ratio)

    def stop(self, ratio: th.Tensor, *, ratio_deviation: float | None) -> bool:
        """Whether the ratios of a minibatch deviate too far."""
        return ratio_deviation is not None and (ratio - 1).abs().mean().item() > ratio_deviation


@register("smoothing", "pspo", formula="alpha", source="PSPO, arXiv 2509.21282", search={"alpha": (0.01, 0.5)})
def smoothing(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, alpha: Fraction = 0.1) -> th.Tensor:
    """
    The ratio replaced by (1 - alpha) w + alpha.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param alpha: share of the gradient that is taken back everywhere
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
    The gradient of (4/τ) σ(τ(w - 1)) Â: from all of it at w = 1 towards none on both sides.

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

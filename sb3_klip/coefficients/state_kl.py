"""Coefficients that bound the KL divergence in each state, or derive the bound on the ratio from it."""

import torch as th

from sb3_klip.coefficients.clipping import clip_removal
from sb3_klip.coefficients.parameters import NonNegative, Positive
from sb3_klip.coefficients.registry import register


@register(
    "trust_region",
    "tr_ppo",
    formula="1 where the state's KL >= delta and (w - 1) Â > 0, else 0",
    source='TR-PPO, Y. Wang et al., "Truly Proximal Policy Optimization", UAI 2020, arXiv 1903.07940',
    search={"delta": (0.003, 0.1)},
)
def trust_region(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    kl: th.Tensor,
    *,
    delta: Positive = 0.035,
) -> th.Tensor:
    """
    A sample is dropped if the KL divergence in its state has reached a bound, and its gradient would increase it further.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param kl: KL(π_old ‖ π_new) of each state
    :param delta: bound on the KL divergence, in nats
    :return: removal
    """
    return leaves_trust_region(ratio, advantages, kl, delta).to(ratio.dtype)


def leaves_trust_region(ratio: th.Tensor, advantages: th.Tensor, kl: th.Tensor, delta: float) -> th.Tensor:
    """
    Samples whose state has left the trust region, and whose gradient leads further away from it.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param kl: KL(π_old ‖ π_new) of each state
    :param delta: bound on the KL divergence, in nats
    :return: whether it is so, of each sample
    """
    return (kl >= delta) & ((ratio - 1) * advantages > 0)


@register(
    "truly",
    "truly_ppo",
    formula="b = alpha where the state's KL >= delta and (w - 1) Â > 0, else 0",
    source='Truly PPO, Y. Wang et al., "Truly Proximal Policy Optimization", UAI 2020, arXiv 1903.07940',
    search={"delta": (0.003, 0.1), "alpha": (0.5, 50.0)},
)
class Truly:
    """
    A penalty on the analytic KL divergence for the samples that ``trust_region`` drops; w Â is unchanged.

    :param delta: bound on the KL divergence, in nats
    :param alpha: weight of the penalty, per nat
    """

    estimator = "analytic"

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | th.Tensor,
        kl: th.Tensor,
        *,
        delta: Positive = 0.03,
        alpha: NonNegative = 5.0,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Removal and weight of each sample.

        :param ratio: importance ratio w
        :param advantages: advantage Â
        :param clip_range: not used
        :param kl: KL(π_old ‖ π_new) of each state
        :param delta: see above
        :param alpha: see above
        :return: removal, and weight of the penalty
        """
        return th.zeros_like(ratio), alpha * leaves_trust_region(ratio, advantages, kl, delta).to(ratio.dtype)


@register(
    "trust_region_guided",
    "trgppo",
    formula="1 above max(u, 1 + ε) where Â > 0, 1 below min(l, 1 - ε) where Â < 0, else 0; l and u are the smallest and the "
    "largest ratio of the action under a policy with KL(π_old ‖ π) <= delta",
    source="TRGPPO, arXiv 1901.10314, which approximates l and u by a network or a table; here they are computed numerically",
    search={"delta": (0.003, 0.1)},
)
def trust_region_guided(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    least_ratio: th.Tensor,
    greatest_ratio: th.Tensor,
    *,
    delta: Positive | None = None,
) -> th.Tensor:
    """
    ``step`` with a wider band for actions whose ratio changes much when the policy changes little.

    The bounds are computed once per rollout (:mod:`sb3_klip.trust_region`).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε of the narrowest band
    :param least_ratio: l, the smallest ratio of the action within the trust region
    :param greatest_ratio: u, the largest one
    :param delta: bound on KL(π_old ‖ π) in nats; None for the value that gives a typical action the band of ``step``
        (:func:`sb3_klip.trust_region.default_delta`)
    :return: removal
    """
    return clip_removal(ratio, advantages, least_ratio.clamp(max=1 - clip_range), greatest_ratio.clamp(min=1 + clip_range))


trust_region_guided.needs_policy_ratio = True  # type: ignore[attr-defined]

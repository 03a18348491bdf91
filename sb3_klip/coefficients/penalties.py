"""Coefficients that see the KL divergence of each state, or put a weight on an estimate of it."""

from typing import Annotated, Any, Literal, TypeAlias

import torch as th

from sb3_klip.coefficients.base import register
from sb3_klip.coefficients.parameters import Interval, NonNegative, Positive, everywhere

Estimator: TypeAlias = Literal["analytic", "k1", "k3"]


@register("trust_region", "tr_ppo")
def trust_region(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    kl: th.Tensor,
    *,
    delta: Positive = 0.035,
) -> th.Tensor:
    """
    g = 1 where the state's KL divergence has reached δ and the step goes on in that direction, (w - 1) Â > 0.

    Source: TR-PPO, Y. Wang et al., "Truly Proximal Policy Optimization", UAI 2020.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param kl: KL(π_old ‖ π_new) of each state
    :param delta: δ, in nats
    :return: gate
    """
    return beyond(ratio, advantages, kl, delta).to(ratio.dtype)


def beyond(ratio: th.Tensor, advantages: th.Tensor, kl: th.Tensor, delta: float) -> th.Tensor:
    """Samples whose state has left the trust region, and that would lead on away from it."""
    return (kl >= delta) & ((ratio - 1) * advantages > 0)


class Truly:
    """
    g = 0, and a weight α on the analytic KL where it has reached δ and the step goes on in that direction.

    Source: Truly PPO, Y. Wang et al., UAI 2020. The sample's own w Â is kept.

    :param delta: δ, in nats
    :param alpha: α, per nat
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
        """Gate and weight of each sample."""
        return th.zeros_like(ratio), alpha * beyond(ratio, advantages, kl, delta).to(ratio.dtype)


register("truly", "truly_ppo")(Truly)


@register("fixed", "ppo_kl")
def fixed(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    value: NonNegative = 1.0,
    estimator: Estimator = "analytic",
) -> tuple[th.Tensor, th.Tensor]:
    """
    g = 0, and one weight b on the KL divergence from the rollout policy, for all samples.

    Source: PPO with a fixed KL penalty, arXiv 1707.06347, sec. 4.

    :param ratio: importance ratio w
    :param advantages: not used
    :param clip_range: not used
    :param value: b, per nat
    :param estimator: ``"analytic"`` (closed form), ``"k1"`` or ``"k3"`` (from the sampled action)
    :return: gate and weight
    """
    return th.zeros_like(ratio), everywhere(value, ratio)


class Adaptive:
    """
    As ``fixed``, with b doubled after a rollout whose KL exceeded 1.5 times the target, halved below target / 1.5.

    The KL is that of the final policy, averaged over the whole rollout; b stays within 1e-4 and 1e4.
    Source: PPO with an adaptive KL penalty, arXiv 1707.06347, eq. 8; the target 0.02 is ε²/2.

    :param initial: b at the start, per nat
    :param kl_target: in nats
    :param factor: by which b is changed
    :param estimator: ``"analytic"`` (closed form), ``"k1"`` or ``"k3"`` (from the sampled action)
    """

    bounds = (1e-4, 1e4)

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | th.Tensor,
        *,
        initial: Annotated[float, Interval(*bounds)] = 1.0,
        kl_target: Positive = 0.02,
        factor: Annotated[float, Interval(1.0, low_open=True)] = 2.0,
        estimator: Estimator = "analytic",
    ) -> tuple[th.Tensor, th.Tensor]:
        """Gate and weight of each sample."""
        return th.zeros_like(ratio), everywhere(initial if self.value is None else self.value, ratio)

    def end_update(self, kl: float, *, initial: float, kl_target: float, factor: float, estimator: str) -> None:
        """Change b by the KL divergence that the update ended with."""
        value = initial if self.value is None else self.value
        if kl > 1.5 * kl_target:
            value *= factor
        elif kl < kl_target / 1.5:
            value /= factor
        self.value = min(max(value, self.bounds[0]), self.bounds[1])

    def state_dict(self) -> dict[str, Any]:
        """The value of b."""
        return {} if self.value is None else {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the value of b."""
        self.value = float(state["value"])


register("adaptive", "ppo_adaptive_kl")(Adaptive)

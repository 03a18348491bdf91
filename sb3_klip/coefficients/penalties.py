"""Coefficients that penalise: a weight, one for all samples, on an estimate of the KL divergence."""

from typing import Annotated, Any, Literal, TypeAlias

import torch as th

from sb3_klip.coefficients.parameters import Interval, NonNegative, Positive, constant_like
from sb3_klip.coefficients.registry import register

Estimator: TypeAlias = Literal["analytic", "k1", "k3"]


@register(
    "fixed",
    "ppo_kl",
    formula="b = value",
    source="PPO with a fixed KL penalty, arXiv 1707.06347, sec. 4",
    search={"value": (0.03, 10.0)},
)
def fixed(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    value: NonNegative = 1.0,
    estimator: Estimator = "analytic",
) -> tuple[th.Tensor, th.Tensor]:
    """
    One weight on the KL divergence from the rollout policy, for all samples.

    :param ratio: importance ratio w
    :param advantages: not used
    :param clip_range: not used
    :param value: weight, per nat
    :param estimator: ``"analytic"`` (closed form), ``"k1"`` or ``"k3"`` (from the sampled action)
    :return: removal and weight
    """
    return th.zeros_like(ratio), constant_like(value, ratio)


@register(
    "adaptive",
    "ppo_adaptive_kl",
    formula="b times factor after a rollout with KL > 1.5 kl_target, divided by it below kl_target / 1.5",
    source="PPO with an adaptive KL penalty, arXiv 1707.06347, eq. 8; the target 0.02 is ε²/2",
    search={"kl_target": (0.003, 0.1)},
)
class Adaptive:
    """
    As ``fixed``, with b doubled after a rollout whose KL exceeded 1.5 times the target, halved below target / 1.5.

    The KL is that of the final policy, averaged over the whole rollout; b stays within 1e-4 and 1e4.

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
        """Removal and weight of each sample."""
        return th.zeros_like(ratio), constant_like(initial if self.value is None else self.value, ratio)

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

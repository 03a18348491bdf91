"""Coefficients that penalise an estimate of the KL divergence, with one weight for all samples."""

from typing import Annotated, Any

import torch as th

from sb3_klip.coefficients.parameters import Interval, NonNegative, Positive, constant_like
from sb3_klip.coefficients.registry import register
from sb3_klip.surrogate import Estimator


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
    A penalty on the KL divergence from the rollout policy, with a fixed weight.

    :param ratio: importance ratio w
    :param advantages: not used
    :param clip_range: not used
    :param value: weight of the penalty, per nat
    :param estimator: ``"analytic"`` (closed form), ``"k1"`` or ``"k3"`` (from the sampled action)
    :return: removal and weight
    """
    return th.zeros_like(ratio), constant_like(value, ratio)


@register(
    "adaptive",
    "ppo_adaptive_kl",
    formula="b is multiplied by factor after an update with KL > 1.5 kl_target, and divided by factor after one with "
    "KL < kl_target / 1.5",
    source="PPO with an adaptive KL penalty, arXiv 1707.06347, eq. 8; the target 0.02 is ε²/2",
    search={"kl_target": (0.003, 0.1)},
)
class Adaptive:
    """
    A penalty whose weight b is multiplied by ``factor`` after an update with KL > 1.5 ``kl_target``.

    After an update with KL < ``kl_target`` / 1.5, it is divided by ``factor``.

    The KL divergence is that of the final policy, averaged over the rollout. b stays between 1e-4 and 1e4.

    :param initial: b in the first update, per nat
    :param kl_target: target of the KL divergence, in nats
    :param factor: factor by which b is changed
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
        """
        Removal and weight of each sample.

        :param ratio: importance ratio w
        :param advantages: not used
        :param clip_range: not used
        :param initial: see above
        :param kl_target: see :meth:`end_update`
        :param factor: see :meth:`end_update`
        :param estimator: see above
        :return: 0, and b
        """
        return th.zeros_like(ratio), constant_like(initial if self.value is None else self.value, ratio)

    def end_update(self, kl: float, *, initial: float, kl_target: float, factor: float, estimator: str) -> None:
        """
        Change b according to the KL divergence at the end of the update.

        :param kl: KL(π_old ‖ π_new), mean over the rollout, in nats
        :param initial: see above
        :param kl_target: see above
        :param factor: see above
        :param estimator: see above
        """
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
        """
        Restore the value of b.

        :param state: what :meth:`state_dict` returned
        """
        self.value = float(state["value"])

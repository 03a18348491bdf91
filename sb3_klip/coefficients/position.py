"""A coefficient whose strength depends on the time step of the sample within its episode."""

from collections.abc import Mapping
from typing import Any

import torch as th

from sb3_klip.coefficients.coefficient import Coefficient, assignments
from sb3_klip.coefficients.parameters import NonNegative, Positive, constant_like
from sb3_klip.coefficients.registry import make_beta, register


class Product(Coefficient):
    """
    Removal and weight of one coefficient, multiplied by the removal of another. It has the state of the first.

    :param base: the coefficient that is scaled
    :param factor: the coefficient whose removal is the factor; it must have no weight and no state
    :param name: name for messages and checkpoints; to be loaded again, it must be registered
    :param parameters: arguments that construct it again under this name
    :raises ValueError: if the factor has a weight, a state or a ``stop``, or both have a trust region, of different sizes
    """

    def __init__(self, base: Coefficient, factor: Coefficient, name: str, parameters: Mapping[str, Any]):
        self.base, self.factor, self.name, self.parameters = base, factor, name, dict(parameters)
        self.settings = {}
        self.function = base.function
        self.requests = tuple(dict.fromkeys(factor.requests + base.requests))
        self.estimator, self.learns = base.estimator, base.learns
        self.needs_clip_range = base.needs_clip_range or factor.needs_clip_range
        self.needs_policy_ratio = base.needs_policy_ratio or factor.needs_policy_ratio
        self.needs_probabilities = base.needs_probabilities or factor.needs_probabilities
        if factor.estimator is not None or any(
            hasattr(factor.function, hook) for hook in ("end_update", "stop", "state_dict")
        ):
            raise ValueError(f"factor={factor!r} of {name!r} must have no weight on a KL estimate, no state and no stop")
        if base.needs_ratio_bounds and factor.needs_ratio_bounds and base.delta != factor.delta:
            raise ValueError(f"base={base!r} and factor={factor!r} of {name!r} must have the same delta")

    @property
    def is_constant(self) -> bool:
        return self.base.is_constant and self.factor.is_constant

    @property
    def delta(self) -> float | None:
        return (self.base if self.base.needs_ratio_bounds else self.factor).delta

    def set_progress(self, progress_remaining: float) -> None:
        self.base.set_progress(progress_remaining)
        self.factor.set_progress(progress_remaining)

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | th.Tensor,
        **quantities: th.Tensor | float | None,
    ) -> tuple[th.Tensor, th.Tensor | None]:
        strength, _ = self.factor(ratio, advantages, clip_range, **quantities)
        removal, weight = self.base(ratio, advantages, clip_range, **quantities)
        return strength * removal, None if weight is None else strength * weight

    def _named(self) -> str:
        # Not in the words of the scaled object, which knows nothing of the factor.
        return f"{self.name}({assignments(self.parameters)})"

    def stop(self, ratio: th.Tensor, mask: th.Tensor | None = None) -> bool:
        return self.base.stop(ratio, mask)

    def end_update(self, kl: float) -> None:
        self.base.end_update(kl)


def ramp_over_episode(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    position: th.Tensor,
    *,
    start: NonNegative = 1.0,
    end: NonNegative = 1.3,
    horizon: Positive = 1000.0,
) -> th.Tensor:
    """
    A factor that changes linearly with the time step, from ``start`` to ``end``, and is constant from step ``horizon`` on.

    :param ratio: importance ratio w
    :param advantages: not used
    :param clip_range: not used
    :param position: steps since the start of the episode
    :param start: value at the first step of an episode
    :param end: value from step ``horizon`` on
    :param horizon: number of steps
    :return: factor, like the ratio
    """
    first, last = constant_like(start, position), constant_like(end, position)
    return first + (last - first) * (position / horizon).clamp(max=1)


@register(
    "position",
    factory=True,
    formula="the coefficient base times a factor, which changes linearly with the time step of the episode, from start at "
    "step 0 to end at step horizon",
    source="arXiv 2606.23932, position-aware coefficients; the linear form and the defaults (PPO-Clip to PPO-RB) are ours",
)
def position(
    *,
    base: Any = "step",
    base_kwargs: dict[str, Any] | None = None,
    start: NonNegative = 1.0,
    end: NonNegative = 1.3,
    horizon: Positive = 1000.0,
) -> Coefficient:
    """
    The coefficient ``base``, scaled by :func:`ramp_over_episode`.

    A factor below 1 keeps a part of the gradient of each clipped sample. This part grows with w without a bound: with
    ``end=0.5``, training collapsed on Hopper-v4 (a return of 14 after 100 000 steps, compared with 1008 for ``step``).

    :param base: the coefficient that is scaled, as in ``beta``
    :param base_kwargs: its parameters, as in ``beta_kwargs``
    :param start: factor at the first step of an episode
    :param end: factor from step ``horizon`` on
    :param horizon: number of steps
    :return: the coefficient
    :raises ValueError: if ``base`` is itself scaled by the position, or not known, or a parameter of it is out of range
    :raises TypeError: if ``base`` or one of its parameters is of a wrong type
    """
    factor = Coefficient(ramp_over_episode, "position", {"start": start, "end": end, "horizon": horizon})
    try:
        scaled = make_beta(base, base_kwargs)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"base={base!r} with base_kwargs={base_kwargs!r} of 'position': {error}") from error
    if scaled.name == "position":
        raise ValueError(f"base={base!r} is itself scaled by the position: give the coefficient to scale, such as 'step'")
    parameters = {"base": scaled.name, "base_kwargs": scaled.parameters, **factor.parameters}
    return Product(scaled, factor, "position", parameters)

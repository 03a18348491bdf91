"""A coefficient whose strength depends on where in its episode a sample was collected."""

from collections.abc import Mapping
from typing import Any

import torch as th

from sb3_klip.coefficients.base import Coefficient, GateFunction, make, register
from sb3_klip.coefficients.parameters import NonNegative, Positive, everywhere


class Scaled(Coefficient):
    """
    The product of a function and another coefficient, given by the function's parameters ``base`` and ``base_kwargs``.

    :param function: returns the factor on gate and weight of the base
    :param name: how it is shown and saved
    :param parameters: values for the function's keyword-only arguments
    """

    def __init__(self, function: GateFunction, name: str, parameters: Mapping[str, Any] | None = None):
        given = dict(parameters or {})
        self.base = make(given.get("base", "step"), **(given.get("base_kwargs") or {}))
        super().__init__(function, name, {**given, "base": self.base.name, "base_kwargs": self.base.parameters})

    @property
    def requests(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._arguments + self.base.requests))

    @property
    def estimator(self) -> str | None:
        return self.base.estimator

    @property
    def needs_clip_range(self) -> bool:
        return self.base.needs_clip_range

    @property
    def learns(self) -> bool:
        return self.base.learns

    def set_progress(self, progress_remaining: float) -> None:
        super().set_progress(progress_remaining)
        self.base.set_progress(progress_remaining)

    def _evaluate(
        self, ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, quantities: Mapping[str, Any]
    ) -> tuple[th.Tensor, th.Tensor | None]:
        strength, _ = super()._evaluate(ratio, advantages, clip_range, quantities)
        gate, weight = self.base(ratio, advantages, clip_range, **quantities)
        return strength * gate, None if weight is None else strength * weight

    def stop(self, ratio: th.Tensor, mask: th.Tensor | None = None) -> bool:
        return self.base.stop(ratio, mask)

    def end_update(self, kl: float) -> None:
        self.base.end_update(kl)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.base.load_state_dict(state)


@register("position", kind=Scaled)
def episode_strength(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    position: th.Tensor,
    *,
    base: Any = "step",
    base_kwargs: dict[str, Any] | None = None,
    start: NonNegative = 1.0,
    end: NonNegative = 1.3,
    horizon: Positive = 1000.0,
) -> th.Tensor:
    """
    The strength of the coefficient ``base``, linear in the sample's position in its episode, from ``start`` to ``end``.

    Source: arXiv 2606.23932, position-aware coefficients; the linear form and the defaults (from PPO-Clip to PPO-RB) are
    ours. A strength below 1 leaves a part of each clipped sample's gradient, which grows with w and is bounded by nothing:
    with ``end=0.5``, training collapsed on Hopper-v4 (a return of 14 after 100 000 steps, and of 1008 with ``step``).

    :param ratio: importance ratio w
    :param advantages: not used
    :param clip_range: not used
    :param position: steps since the start of the episode
    :param base: the coefficient that is scaled, as in ``beta``
    :param base_kwargs: its parameters, as in ``beta_kwargs``
    :param start: strength at the first step of an episode
    :param end: strength from step ``horizon`` on
    :param horizon: in steps
    :return: factor on the gate (and weight) of ``base``
    """
    first, last = everywhere(start, position), everywhere(end, position)
    return first + (last - first) * (position / horizon).clamp(max=1)

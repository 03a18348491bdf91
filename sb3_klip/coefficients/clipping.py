"""Coefficients that drop samples past a bound on the ratio: PPO-Clip and its relatives."""

from typing import Annotated

import torch as th

from sb3_klip.coefficients.parameters import Interval, NonNegative
from sb3_klip.coefficients.registry import register


def clip_removal(ratio: th.Tensor, advantages: th.Tensor, lower: float | th.Tensor, upper: float | th.Tensor) -> th.Tensor:
    """
    What autograd takes off the gradient of w Â in ``min(w Â, clamp(w, lower, upper) Â)``: 1 on the kill set, else 0.

    An ulp or two outside the band, the two products can round to the same number. Autograd of the minimum then gives half
    of the gradient to each, and the half of the clamped one is lost, so the removal is 1/2 there. This happens to about one
    sample in 10^8, which is often enough for a long run of PPO to be left by one that does not know it.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param lower: lower bound, as given to ``torch.clamp``
    :param upper: upper bound, likewise
    :return: removal
    """
    surrogate, clamped = advantages * ratio, advantages * th.clamp(ratio, lower, upper)  # type: ignore[arg-type]
    tie = (surrogate == clamped) & ((ratio < lower) | (ratio > upper))
    return (clamped < surrogate).to(ratio.dtype).masked_fill(tie, 0.5)


@register(
    "step",
    "ppo_clip",
    formula="1 on the kill set, else 0",
    source="PPO-Clip, arXiv 1707.06347, eq. 7; the identity, arXiv 2606.23932, theorem 1",
    search={},
)
def step(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    PPO-Clip's gradient, exactly (see :func:`clip_removal` on rounding).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :return: removal
    """
    return clip_removal(ratio, advantages, 1 - clip_range, 1 + clip_range)


@register(
    "clip_higher",
    "dapo",
    formula="1 past 1 + high where Â > 0, past 1 - low where Â < 0",
    source="DAPO, arXiv 2503.14476",
    search={"low": (0.05, 0.5), "high": (0.05, 1.0)},
)
def clip_higher(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    low: Annotated[float, Interval(0.0, 1.0, high_open=True)] = 0.2,
    high: NonNegative = 0.28,
) -> th.Tensor:
    """
    ``step`` with the band [1 - low, 1 + high] in place of ε.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param low: ε below 1
    :param high: ε above 1
    :return: removal
    """
    return clip_removal(ratio, advantages, 1 - low, 1 + high)


@register(
    "dual_clip",
    formula="1 on the kill set, and where Â < 0 and w > bound",
    source="D. Ye et al., arXiv 1912.09729, eq. 5",
    search={"bound": (1.5, 10.0)},
)
def dual_clip(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    bound: Annotated[float, Interval(1.0, low_open=True)] = 3.0,
) -> th.Tensor:
    """
    ``step``, with PPO-Clip's loss on a bad action bounded as well.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param bound: greatest ratio at which a bad action is still corrected
    :return: removal
    """
    return step(ratio, advantages, clip_range).masked_fill((advantages < 0) & (ratio > bound), 1.0)

"""Coefficients that are a gate: pure functions of ratio, advantages and clip range."""

import torch as th

from sb3_klip.coefficients.base import register
from sb3_klip.partition import partition


@register("step", "ppo_clip")
def step(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    g = 1 on the kill set, else 0: PPO-Clip's gradient, exactly.

    Source: PPO-Clip, arXiv 1707.06347, eq. 7; the identity, arXiv 2606.23932, theorem 1.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :return: gate
    """
    return partition(ratio, advantages, clip_range).kill.to(ratio.dtype)


@register("none")
def none(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    g = 0: the importance-weighted surrogate with no trust region.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :return: gate
    """
    return th.zeros_like(ratio)

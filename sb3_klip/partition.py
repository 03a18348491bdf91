"""The trust region around a ratio of one: its bounds, the three sets it splits a batch into, and the distance past it.

Notation (Schulman et al. 2017, arXiv 1707.06347): ratio ``w = π_new(a|s) / π_old(a|s)``, advantage ``Â``, half-width ``ε``.
"""

from typing import NamedTuple

import torch as th


class Partition(NamedTuple):
    """
    Three disjoint boolean masks that cover a batch, each of the shape of the ratio.

    :param kill: the clip removes the gradient: the step was good for the objective and already too long
    :param outside: the ratio left the band, but the gradient flows, as it leads back ("pass" in the logs)
    :param inside: the ratio is in the band, its boundary included, or the advantage is zero
    """

    kill: th.Tensor
    outside: th.Tensor
    inside: th.Tensor


def bounds(clip_range: float | th.Tensor) -> tuple[float | th.Tensor, float | th.Tensor]:
    """
    Bounds of the band ``[1 - ε, 1 + ε]`` in which ``torch.clamp`` leaves a ratio unchanged.

    A linear schedule takes ε below zero when the last rollout overshoots the number of steps. There ``torch.clamp`` lets
    the upper bound win, so both bounds are then ``1 + ε``.

    :param clip_range: half-width ε, a number or a tensor that broadcasts against the ratio
    :return: lower and upper bound
    """
    upper = 1 + clip_range
    if isinstance(clip_range, th.Tensor):
        return th.minimum(1 - clip_range, th.as_tensor(upper)), upper
    return min(1 - clip_range, upper), upper


def partition(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> Partition:
    """
    Split a batch by what PPO-Clip does to each sample's gradient.

    - kill: ``(w > upper and Â > 0) or (w < lower and Â < 0)``, gradient zero
    - pass: ``(w > upper and Â < 0) or (w < lower and Â > 0)``, gradient flows
    - inside: everything else, gradient flows (zero where ``Â = 0``)

    Source: arXiv 2606.23932; the boundary counts as inside, as it does in the gradient of ``torch.clamp``.

    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape
    :param clip_range: half-width ε of the band
    :return: the masks ``kill``, ``outside`` (pass) and ``inside``
    """
    lower, upper = bounds(clip_range)
    above, below = ratio > upper, ratio < lower
    gain, loss = advantages > 0, advantages < 0
    kill = (above & gain) | (below & loss)
    outside = (above & loss) | (below & gain)
    return Partition(kill, outside, ~(kill | outside))


def harmful_distance(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    Signed distance d of a ratio past the boundary at which PPO-Clip starts to remove its gradient.

    ``d = w - upper`` where ``Â >= 0`` and ``lower - w`` where ``Â < 0``: positive exactly on the kill set (where ``Â = 0``
    there is no gradient, whatever d is). Source: arXiv 2606.23932.

    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape
    :param clip_range: half-width ε of the band
    :return: distance in units of the ratio, same shape
    """
    lower, upper = bounds(clip_range)
    return th.where(advantages < 0, lower - ratio, ratio - upper)

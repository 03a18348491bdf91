"""Coefficients that let the gradient fade out around the bound on the ratio, in place of PPO-Clip's sharp step."""

import torch as th

from sb3_klip.coefficients.clipping import step
from sb3_klip.coefficients.parameters import NonNegative, Positive
from sb3_klip.coefficients.registry import register
from sb3_klip.surrogate import harmful_distance, partition


@register("linear_ramp", formula="clamp(d / width, 0, 1)", source="arXiv 2606.23932", search={"width": (0.01, 1.0)})
def linear_ramp(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, width: NonNegative = 0.05
) -> th.Tensor:
    """
    The gradient fades out over a width past the harmful bound; a width of 0 is ``step``.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param width: in units of the ratio
    :return: removal
    """
    if width == 0:
        return step(ratio, advantages, clip_range)
    return (harmful_distance(ratio, advantages, clip_range) / width).clamp(0, 1)


@register(
    "sigmoid", formula="σ(d / temperature)", source="arXiv 2606.23932, the authors' study", search={"temperature": (0.01, 1.0)}
)
def sigmoid(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, temperature: Positive = 0.05
) -> th.Tensor:
    """
    A smooth step, which is 1/2 at the harmful bound.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param temperature: in units of the ratio
    :return: removal
    """
    return th.sigmoid(harmful_distance(ratio, advantages, clip_range) / temperature)


@register(
    "soft_min",
    formula="1 - σ((clip(w) - w) sign(Â) / temperature) outside the band, 0 inside",
    source="arXiv 2606.23932, the authors' study",
    search={"temperature": (0.01, 1.0)},
)
def soft_min(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, temperature: Positive = 0.05
) -> th.Tensor:
    """
    PPO-Clip's minimum replaced by a soft one, -τ log(e^(-x/τ) + e^(-y/τ)), of x = w sign Â and y = clip(w) sign Â.

    It jumps to about one half at both edges of the band, where a step backward is being corrected too, and tends to ``step``
    as the temperature τ goes to 0.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param temperature: τ, in units of the ratio
    :return: removal
    """
    _, _, inside = partition(ratio, advantages, clip_range)
    clipped = th.clamp(ratio, 1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]
    # 1 - σ(x) is σ(-x), without the loss of digits
    return th.sigmoid((ratio - clipped) * advantages.sign() / temperature).masked_fill(inside, 0.0)


@register(
    "asymmetric",
    formula="clamp(d / width_up, 0, 1) where w > 1, clamp(d / width_down, 0, 1) where w < 1",
    source='arXiv 2606.23932, "asymmetric trust regions"; that the sides meet at w = 1 is our reading',
    search={"width_up": (0.01, 1.0), "width_down": (0.01, 1.0)},
)
def asymmetric(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    width_up: NonNegative = 0.1,
    width_down: NonNegative = 0.0,
) -> th.Tensor:
    """
    A linear ramp with a width of its own on each side of w = 1; a width of 0 is a sharp step.

    The paper says to soften one side and keep the other sharp.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param width_up: width where w > 1
    :param width_down: width where w < 1
    :return: removal
    """
    up = linear_ramp(ratio, advantages, clip_range, width=width_up)
    down = linear_ramp(ratio, advantages, clip_range, width=width_down)
    return th.where(ratio > 1, up, down)

"""Coefficients that let the gradient fade out around the bound on the ratio, in place of PPO-Clip's sharp step."""

import torch as th

from sb3_klip.coefficients.clipping import step
from sb3_klip.coefficients.parameters import NonNegative, Positive, constant_like
from sb3_klip.coefficients.registry import register
from sb3_klip.coefficients.reweighting import removal_of
from sb3_klip.surrogate import bounds, harmful_distance, partition


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


@register(
    "gradient_preserving",
    formula="on the kill set, 1 - high (1 + ε) / w where Â > 0 and 1 - low (1 - ε) / w where Â < 0, else 0",
    source="CE-GPPO, arXiv 2509.20712; GPPO, arXiv 2508.07629",
    search={"low": (0.1, 1.0), "high": (0.1, 1.0)},
    ce_gppo={},
    gppo={"low": 1.0, "high": 1.0},
)
def gradient_preserving(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    low: NonNegative = 0.75,
    high: NonNegative = 1.0,
) -> th.Tensor:
    """
    Past the harmful bound, the ratio counts as a share of the bound, so that a clipped sample keeps a bounded gradient.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param low: share of the lower bound, where Â < 0
    :param high: share of the upper bound, where Â > 0
    :return: removal
    """
    lower, upper = bounds(clip_range)
    multiplier = th.where(advantages < 0, constant_like(low * lower, ratio), constant_like(high * upper, ratio))
    return step(ratio, advantages, clip_range) * removal_of(multiplier, ratio)


@register(
    "decoupled_decay",
    "dgpo",
    formula="on the kill set, 1 - ((1 + ε) / w)^(1 / m) where Â > 0 and 1 - (w / (1 - ε))^n where Â < 0, else 0",
    source="DGPO, arXiv 2603.14389",
    search={"n": (0.3, 10.0), "m": (0.3, 10.0)},
)
def decoupled_decay(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    n: NonNegative = 1.0,
    m: Positive = 2.0,
) -> th.Tensor:
    """
    Past the harmful bound, the gradient decays by a power of the ratio, with an exponent of its own on each side.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param n: exponent below the band, where Â < 0
    :param m: inverse exponent above the band, where Â > 0
    :return: removal
    """
    kill, _, _ = partition(ratio, advantages, clip_range)
    lower, upper = bounds(clip_range)
    # A finite argument for samples that are not killed, whose removal is 0.
    inner = ratio.masked_fill(~kill, 1.0)
    kept = th.where(advantages < 0, (inner / lower) ** n, (constant_like(upper, ratio) / inner) ** (1 / m))
    return (1 - kept).masked_fill(~kill, 0.0)


@register(
    "mass_adaptive",
    "maspo",
    formula="1 - exp(-(w - 1)² / (2 s²)) where (w - 1) Â > 0, else 0; s = clamp(sigma / q^alpha, sigma, sigma_max) · "
    "clamp(1 + beta_pos Â where Â > 0, 1 / (1 - beta_neg Â) where Â < 0; 0.1, 10)",
    source="MASPO, arXiv 2602.17550",
    search={"sigma": (0.1, 3.0), "alpha": (0.1, 1.0)},
)
def mass_adaptive(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    old_log_prob: th.Tensor,
    *,
    sigma: Positive = 1.0,
    sigma_max: Positive = 10.0,
    alpha: NonNegative = 0.3,
    beta_pos: NonNegative = 0.03,
    beta_neg: NonNegative = 0.03,
) -> th.Tensor:
    """
    The gradient fades out as a Gaussian from w = 1 on, the wider the less probable the action and the better it was.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param old_log_prob: log q, of a probability
    :param sigma: width for an action of probability 1
    :param sigma_max: greatest width, before the advantage changes it
    :param alpha: how much wider it is for improbable actions
    :param beta_pos: how much wider it is for good actions, per unit of the advantage
    :param beta_neg: how much narrower it is for bad actions, per unit of the advantage
    :return: removal
    """
    mass = (sigma * (-alpha * old_log_prob).exp()).clamp(sigma, sigma_max)
    risk = th.where(advantages < 0, 1 / (1 + beta_neg * advantages.abs()), 1 + beta_pos * advantages).clamp(0.1, 10.0)
    removal = -th.expm1(-((ratio - 1) / (mass * risk)).square() / 2)
    return removal.masked_fill((ratio - 1) * advantages <= 0, 0.0)


mass_adaptive.needs_probabilities = True  # type: ignore[attr-defined]

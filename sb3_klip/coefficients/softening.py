"""Coefficients that reduce the gradient gradually around the bound on the ratio, instead of in one step as PPO-Clip does."""

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
    The gradient falls linearly to zero over a width beyond the bound; a width of 0 is ``step``.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param width: width of the ramp, in units of the ratio
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
    A smooth step, which is 1/2 at the bound (d = 0).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param temperature: width of the step, in units of the ratio
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

    The removal jumps to about 1/2 at both edges of the band, so it also reduces the gradient in the pass set. It tends to
    ``step`` as the temperature τ goes to 0.

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
    A linear ramp with separate widths for w > 1 and w < 1; a width of 0 is a sharp step.

    The paper softens one side and keeps the other sharp.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param width_up: width where w > 1, in units of the ratio
    :param width_down: width where w < 1, in units of the ratio
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
    On the kill set, the ratio is replaced by a multiple of the bound. So a clipped sample keeps a bounded gradient.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param low: factor on the lower bound 1 - ε, where Â < 0
    :param high: factor on the upper bound 1 + ε, where Â > 0
    :return: removal
    """
    lower, upper = bounds(clip_range)
    multiplier = th.where(advantages < 0, constant_like(low * lower, ratio), constant_like(high * upper, ratio))
    return step(ratio, advantages, clip_range) * removal_of(multiplier, ratio)


gradient_preserving.needs_policy_ratio = True  # type: ignore[attr-defined]


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
    On the kill set, the gradient decays as a power of the ratio, with separate exponents above and below the band.

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


decoupled_decay.needs_policy_ratio = True  # type: ignore[attr-defined]


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
    The gradient decays as a Gaussian of w - 1, which is wider for less probable actions and for larger advantages.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param old_log_prob: log q, the log-probability (not density) of the action under the rollout policy
    :param sigma: width for an action of probability 1, in units of the ratio
    :param sigma_max: largest width, before the advantage changes it
    :param alpha: exponent of 1 / q in the width
    :param beta_pos: relative increase of the width per unit of the advantage, where Â > 0
    :param beta_neg: relative decrease of the width per unit of the advantage, where Â < 0
    :return: removal
    """
    mass = (sigma * (-alpha * old_log_prob).exp()).clamp(sigma, sigma_max)
    risk = th.where(advantages < 0, 1 / (1 + beta_neg * advantages.abs()), 1 + beta_pos * advantages).clamp(0.1, 10.0)
    removal = -th.expm1(-((ratio - 1) / (mass * risk)).square() / 2)
    return removal.masked_fill((ratio - 1) * advantages <= 0, 0.0)


mass_adaptive.needs_probabilities = True  # type: ignore[attr-defined]
mass_adaptive.needs_policy_ratio = True  # type: ignore[attr-defined]

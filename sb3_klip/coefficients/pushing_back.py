"""Coefficients that reverse the gradient of a sample beyond the bound, which pushes its ratio back within the bound."""

import math
from typing import Annotated

import torch as th

from sb3_klip.coefficients.clipping import step
from sb3_klip.coefficients.parameters import Interval, NonNegative, Positive
from sb3_klip.coefficients.registry import register


@register(
    "rollback",
    "ppo_rb",
    formula="1 + slope on the kill set, else 0",
    source='PPO-RB, Y. Wang et al., "Truly Proximal Policy Optimization", UAI 2020, arXiv 1903.07940',
    search={"slope": (0.01, 1.0)},
)
def rollback(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, slope: NonNegative = 0.3) -> th.Tensor:
    """
    The gradient is reversed on the kill set.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param slope: size of the reversed gradient, relative to the sample's own gradient
    :return: removal
    """
    return step(ratio, advantages, clip_range) * (1 + slope)


@register("quadratic", "spo", formula="sign(Â) (w - 1) / ε", source="SPO, arXiv 2401.16025 (ICML 2025)", search={})
def quadratic(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    The gradient of ``w Â - |Â|(w - 1)²/(2ε)``; needs ε > 0.

    It is zero at the bound at which PPO clips, reversed beyond it, and amplified on the other side of 1.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :return: removal
    """
    return (advantages.sign() * (ratio - 1) / clip_range).masked_fill(advantages == 0, 0.0)  # where 0 times infinity is NaN


quadratic.needs_clip_range = True  # type: ignore[attr-defined]


@register(
    "bounded_ratio",
    "bpo",
    formula="2 where (w - w*) Â > 0, w* = 1 + ε tanh(Â / (2 temperature)), else 0",
    source="BPO, arXiv 2604.18578, which uses ε = 0.3 and a second value head that learns a median of returns",
    search={"temperature": (0.0001, 1.0)},
)
def bounded_ratio(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, temperature: Positive = 0.001
) -> th.Tensor:
    """
    The gradient of ``-|w - w*| |Â|``, which always points to the ratio w* of the best policy within the band.

    Only the loss of BPO is included; the advantages are the usual ones. In the paper's form, w* is 1 - ε + 2 ε σ(Â / λ).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param temperature: λ, in units of the advantage; with 0.001, w* is a bound of the band for nearly all samples
    :return: removal
    """
    best = 1 + clip_range * th.tanh(advantages / (2 * temperature))
    return 2 * ((ratio - best) * advantages > 0).to(ratio.dtype)


@register(
    "redescending",
    "ano",
    formula="1 + kappa_plus ν tanh(y / 2) / (e^y + ν) with y = a (x - 1 - ε), x = w where Â >= 0 and x = 2 - w where Â < 0; "
    "ν and a follow from kappa_plus, kappa_minus and ε",
    source="ANO, arXiv 2605.02320",
    search={"kappa_plus": (3.0, 30.0)},
)
def redescending(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    kappa_plus: Annotated[float, Interval(1.0, low_open=True)] = 10.0,
    kappa_minus: Annotated[float, Interval(high=0.0, high_open=True)] = -1.5,
) -> th.Tensor:
    """
    The gradient is zero at the bound (d = 0), reversed beyond it, and tends to zero far from it; needs ε > 0.

    ``1 - g`` is the slope G'(x) of a function whose largest slope is ``kappa_plus`` (far below the bound) and whose smallest
    slope is ``kappa_minus``. ν and a follow from these two and from G'(1) = 1.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param kappa_plus: largest slope
    :param kappa_minus: smallest slope, greater than -``kappa_plus``
    :return: removal
    :raises ValueError: if ``-kappa_minus`` is not less than ``kappa_plus``
    """
    nu, exponent = redescending_shape(kappa_plus, kappa_minus)
    x = th.where(advantages < 0, 2 - ratio, ratio)
    y = exponent * (x - 1 - clip_range) / clip_range
    return 1 + kappa_plus * nu * th.tanh(y / 2) / (y.exp() + nu)


redescending.needs_clip_range = True  # type: ignore[attr-defined]


def redescending_shape(kappa_plus: float, kappa_minus: float) -> tuple[float, float]:
    """
    ν and a ε of :func:`redescending`, from min G' = ``kappa_minus`` and G'(1) = 1 in closed form.

    :param kappa_plus: as there
    :param kappa_minus: as there
    :return: ν and a ε
    :raises ValueError: if ``-kappa_minus`` is not less than ``kappa_plus``
    """
    k = -kappa_minus
    if k >= kappa_plus:
        raise ValueError(f"kappa_minus={kappa_minus:g} of 'redescending' must be greater than -kappa_plus={-kappa_plus:g}")
    a, b, c = kappa_plus - k, -4 * k, -(2 * kappa_plus + 4 * k)
    s = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    nu = s * s / 2 - 1
    b, c = 1 + nu + kappa_plus * nu, nu - kappa_plus * nu
    at_one = (-b + math.sqrt(b * b - 4 * c)) / 2  # e^y at x = 1
    return nu, -math.log(at_one)

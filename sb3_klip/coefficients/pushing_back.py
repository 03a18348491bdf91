"""Coefficients that push a sample past the bound back to the band."""

import torch as th

from sb3_klip.coefficients.clipping import step
from sb3_klip.coefficients.parameters import NonNegative
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
    The gradient turns round past the bound.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param slope: strength of the push, as a share of the sample's own gradient
    :return: removal
    """
    return step(ratio, advantages, clip_range) * (1 + slope)


@register("quadratic", "spo", formula="sign(Â) (w - 1) / ε", source="SPO, arXiv 2401.16025 (ICML 2025)", search={})
def quadratic(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    The gradient of ``w Â - |Â|(w - 1)²/(2ε)``: zero at the band's edge, pushing back beyond; needs ε > 0.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :return: removal
    """
    return advantages.sign() * (ratio - 1) / clip_range


quadratic.needs_clip_range = True  # type: ignore[attr-defined]

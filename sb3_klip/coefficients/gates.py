"""Coefficients that are a gate: pure functions of ratio, advantages and clip range."""

from typing import Annotated

import torch as th

from sb3_klip.coefficients.base import register
from sb3_klip.coefficients.parameters import Fraction, Interval, NonNegative, Positive, everywhere
from sb3_klip.partition import harmful_distance, partition


def clip_gate(ratio: th.Tensor, advantages: th.Tensor, lower: float | th.Tensor, upper: float | th.Tensor) -> th.Tensor:
    """
    What autograd takes off the gradient of w Â in ``min(w Â, clamp(w, lower, upper) Â)``: 1 on the kill set, else 0.

    An ulp or two outside the band, the two products can round to the same number. Autograd of the minimum then gives half
    of the gradient to each, and the half of the clamped one is lost, so the gate is 1/2 there. This happens to about one
    sample in 10^8, which is often enough for a long run of PPO to be left by one that does not know it.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param lower: lower bound, as given to ``torch.clamp``
    :param upper: upper bound, likewise
    :return: gate
    """
    surrogate, clamped = advantages * ratio, advantages * th.clamp(ratio, lower, upper)  # type: ignore[arg-type]
    tie = (surrogate == clamped) & ((ratio < lower) | (ratio > upper))
    return (clamped < surrogate).to(ratio.dtype).masked_fill(tie, 0.5)


@register("step", "ppo_clip")
def step(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    g = 1 on the kill set, else 0: PPO-Clip's gradient, exactly (see :func:`clip_gate` on rounding).

    Source: PPO-Clip, arXiv 1707.06347, eq. 7; the identity, arXiv 2606.23932, theorem 1.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :return: gate
    """
    return clip_gate(ratio, advantages, 1 - clip_range, 1 + clip_range)


class Unclipped:
    """
    g = 0: the importance-weighted surrogate with no trust region.

    With ``ratio_deviation`` it is ESPO, which ends the inner loop once the mean of ``|w - 1|`` over a minibatch passes that
    bound. Source: arXiv 2202.00079 (bound 0.25).

    :param ratio_deviation: bound on the mean of ``|w - 1|``; None for no early stopping
    """

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | th.Tensor,
        *,
        ratio_deviation: Positive | None = None,
    ) -> th.Tensor:
        """Gate of each sample."""
        return th.zeros_like(ratio)

    def stop(self, ratio: th.Tensor, *, ratio_deviation: float | None) -> bool:
        """Whether the ratios of a minibatch deviate too far."""
        return ratio_deviation is not None and (ratio - 1).abs().mean().item() > ratio_deviation


register("none", espo={"ratio_deviation": 0.25})(Unclipped)


@register("linear_ramp")
def linear_ramp(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, width: NonNegative = 0.05
) -> th.Tensor:
    """
    g = clamp(d/δ, 0, 1): the gradient fades out over a width δ past the harmful bound; δ = 0 is ``step``.

    Source: arXiv 2606.23932.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param width: δ, in units of the ratio
    :return: gate
    """
    if width == 0:
        return step(ratio, advantages, clip_range)
    return (harmful_distance(ratio, advantages, clip_range) / width).clamp(0, 1)


@register("sigmoid")
def sigmoid(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, temperature: Positive = 0.05
) -> th.Tensor:
    """
    g = σ(d/τ): a smooth step, which is 1/2 at the harmful bound.

    Source: arXiv 2606.23932, the authors' study.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param temperature: τ, in units of the ratio
    :return: gate
    """
    return th.sigmoid(harmful_distance(ratio, advantages, clip_range) / temperature)


@register("soft_min")
def soft_min(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, temperature: Positive = 0.05
) -> th.Tensor:
    """
    PPO-Clip's minimum replaced by a soft one, -τ log(e^(-x/τ) + e^(-y/τ)), of x = w sign Â and y = clip(w) sign Â.

    Outside the band g = 1 - p with p = σ((y - x)/τ), inside it 0: it jumps to about one half at both edges, where a step
    backward is being corrected too, and tends to ``step`` as τ goes to 0. Source: arXiv 2606.23932, the authors' study.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param temperature: τ, in units of the ratio
    :return: gate
    """
    _, _, inside = partition(ratio, advantages, clip_range)
    clipped = th.clamp(ratio, 1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]
    # 1 - σ(x) is σ(-x), without the loss of digits
    return th.sigmoid((ratio - clipped) * advantages.sign() / temperature).masked_fill(inside, 0.0)


@register("asymmetric")
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

    The paper (arXiv 2606.23932, "asymmetric trust regions") says to soften one side and keep the other sharp; that the
    sides meet at w = 1 is our reading.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param width_up: width δ where w > 1
    :param width_down: width δ where w < 1
    :return: gate
    """
    up = linear_ramp(ratio, advantages, clip_range, width=width_up)
    down = linear_ramp(ratio, advantages, clip_range, width=width_down)
    return th.where(ratio > 1, up, down)


@register("clip_higher", "dapo")
def clip_higher(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    low: Annotated[float, Interval(0.0, 1.0, high_open=True)] = 0.2,
    high: NonNegative = 0.28,
) -> th.Tensor:
    """
    ``step`` with the band [1 - ε_low, 1 + ε_high] in place of ε.

    Source: DAPO, arXiv 2503.14476.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param low: ε_low
    :param high: ε_high
    :return: gate
    """
    return clip_gate(ratio, advantages, 1 - low, 1 + high)


@register("dual_clip")
def dual_clip(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    bound: Annotated[float, Interval(1.0, low_open=True)] = 3.0,
) -> th.Tensor:
    """
    ``step``, and g = 1 where Â < 0 and w > c as well: PPO-Clip's loss on a bad action is bounded.

    Source: D. Ye et al., arXiv 1912.09729, eq. 5.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param bound: c
    :return: gate
    """
    return step(ratio, advantages, clip_range).masked_fill((advantages < 0) & (ratio > bound), 1.0)


@register("rollback", "ppo_rb")
def rollback(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, slope: NonNegative = 0.3) -> th.Tensor:
    """
    g = 1 + α on the kill set: the ratio is pushed back to the band.

    Source: PPO-RB, Y. Wang et al., "Truly Proximal Policy Optimization", UAI 2020.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param slope: α
    :return: gate
    """
    return step(ratio, advantages, clip_range) * (1 + slope)


@register("quadratic", "spo")
def quadratic(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    g = sign(Â)(w - 1)/ε: the gradient of ``w Â - |Â|(w - 1)²/(2ε)``, zero at the band's edge, pushing back beyond.

    Needs ε > 0. Source: SPO, arXiv 2401.16025 (ICML 2025).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :return: gate
    """
    return advantages.sign() * (ratio - 1) / clip_range


quadratic.needs_clip_range = True  # type: ignore[attr-defined]


@register("smoothing", "pspo")
def smoothing(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, *, alpha: Fraction = 0.1) -> th.Tensor:
    """
    g = α everywhere: the ratio replaced by (1 - α) w + α.

    Source: PSPO, arXiv 2509.21282.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param alpha: α
    :return: gate
    """
    return everywhere(alpha, ratio)


@register("soft_adaptive", "sapo")
def soft_adaptive(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    tau_pos: Positive = 1.0,
    tau_neg: Positive = 1.05,
) -> th.Tensor:
    """
    g = 1 - 4p(1 - p) with p = σ(τ(w - 1)), τ by the sign of Â: a smooth gate, from 0 at w = 1 towards 1 on both sides.

    Source: SAPO, arXiv 2511.20347; the objective is (4/τ) σ(τ(w - 1)) Â.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param tau_pos: τ where Â > 0
    :param tau_neg: τ where Â <= 0
    :return: gate
    """
    temperature = th.where(advantages > 0, everywhere(tau_pos, ratio), everywhere(tau_neg, ratio))
    # 1 - 4p(1 - p) is tanh² of half the argument, without the loss of digits near w = 1
    return th.tanh(temperature * (ratio - 1) / 2).square()

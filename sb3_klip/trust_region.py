"""
The smallest and the largest ratio π(a|s) / π_old(a|s) of an action within the trust region KL(π_old ‖ π) <= δ.

These are the bounds of TRGPPO (Y. Wang et al., "Trust Region-Guided Proximal Policy Optimization", NeurIPS 2019, arXiv
1901.10314), whose authors approximate them by a network or a table. Here they are computed numerically. With the Lagrange
multiplier 1/t for the constraint, the policy with the largest ratio maximises ``t log π(a) - KL(π_old ‖ π)``. Up to a factor
and a constant, this is the mean of log π over a mixture of π_old, with weight 1, and a point mass at the action, with weight
t. So the policy is the maximum-likelihood fit to the mixture. With t < 0, the policy has the smallest ratio. KL(π_old ‖ π)
increases with ``|t|``, starting at 0. So there is one equation with one unknown per sample and bound, for any number of action
dimensions.

All functions are pure, and compute in float64 for all samples at once.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch as th

from sb3_klip.divergence import Parameters

#: Of t, 1 + t and v: KL(π_old ‖ π) of each sample, and how fast the log ratio grows with t.
Divergence: TypeAlias = Callable[[th.Tensor, th.Tensor, th.Tensor], tuple[th.Tensor, th.Tensor]]
#: Of 1 + t and v: log(π(a) / π_old(a)) of each sample.
LogRatio: TypeAlias = Callable[[th.Tensor, th.Tensor], th.Tensor]

#: How far the root may be from where it is to second order in t, in log u. A ratio that has not got there is at its limit.
RANGE = (-10.0, 60.0)
#: Six gave nine digits for |z| up to 40 in up to 17 dimensions, and δ from 1e-5 to 2; two more are for what is beyond.
ITERATIONS = 8


def gaussian_ratio_bounds(z: th.Tensor, delta: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Smallest and largest ratio of an action under diagonal Gaussians with KL(π_old ‖ π) <= δ.

    Standardised by π_old, the fit to the mixture has the mean ``m = t z / (1 + t)`` and the variance ``s² = v / (1 + t)²``,
    with ``v = 1 + t (1 + z²)``. A bijection such as tanh changes neither the ratio nor the divergence.

    :param z: action, standardised by mean and standard deviation of π_old; shape (..., d)
    :param delta: δ in nats, >= 0
    :return: lower and upper bound, each of shape (...)
    """
    square = z.double().square()
    scale = 1 + square  # v = 1 + t scale

    def divergence(t: th.Tensor, total: th.Tensor, v: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        inverse = 1 / v
        kl = (v.log() / 2 - total.log() + (t + total * inverse - 1) / 2).sum(dim=-1)
        slope = (1 / total + scale * inverse * (square * inverse - 1) / 2).sum(dim=-1)
        return kl, slope

    def log_ratio(total: th.Tensor, v: th.Tensor) -> th.Tensor:
        return (total.log() - v.log() / 2 + square * (1 - 1 / v) / 2).sum(dim=-1)

    # The least t is the one at which the first of the variances vanishes.
    return _solved(divergence, log_ratio, 1 / scale, delta)


def categorical_ratio_bounds(prob: th.Tensor, delta: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Smallest and largest ratio of an action under categorical distributions with KL(π_old ‖ π) <= δ.

    They are the two roots r of ``(1 - q) log((1 - q) / (1 - q r)) - q log r = δ``: the other actions keep their proportions.

    :param prob: probability q of the action under π_old, any shape
    :param delta: δ in nats, >= 0
    :return: lower and upper bound, each of the shape of ``prob``
    """
    return factored_ratio_bounds(prob.unsqueeze(-1), delta)


def factored_ratio_bounds(prob: th.Tensor, delta: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Smallest and largest ratio of an action that consists of several independent categorical or Bernoulli variables.

    The sum of the divergences of the variables is at most δ. All have the same t, and ``π(a_i) = (q_i + t) / (1 + t)``.

    :param prob: probability q_i under π_old of the value that each variable took, shape (..., d)
    :param delta: δ in nats, >= 0
    :return: lower and upper bound, each of shape (...)
    """
    q = prob.double().clamp(th.finfo(th.float64).tiny, 1.0)  # a probability from logits may be rounded to more than 1

    def divergence(t: th.Tensor, total: th.Tensor, v: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return (total.log() - q * v.log()).sum(dim=-1), ((1 - q) / (q * v * total)).sum(dim=-1)

    def log_ratio(total: th.Tensor, v: th.Tensor) -> th.Tensor:
        return (v.log() - total.log()).sum(dim=-1)

    # v = 1 + t / q; the least t is the one at which the first of the probabilities vanishes.
    return _solved(divergence, log_ratio, q, delta)


def default_delta(family: str, clip_range: float, dimensions: int) -> float:
    """
    The δ with which the largest ratio of a typical action is 1 + ε.

    For Gaussians, the typical action is the mean action, as in TRGPPO (arXiv 1901.10314):
    ``δ = (d/2) ((1 + ε)^(2/d) - 1) - log(1 + ε)``. For discrete actions, it is an action in which each variable has the
    probability 1/2: ``δ = -(d/2) log(1 - ((1 + ε)^(1/d) - 1)²)``; TRGPPO uses δ = 0.001 with ε = 0.1 instead.

    :param family: ``"gaussian"``, ``"categorical"`` or ``"bernoulli"``
    :param clip_range: half-width ε
    :param dimensions: number d of the action's dimensions or variables
    :return: δ in nats
    :raises ValueError: if no discrete action of probability 1/2 can have the ratio 1 + ε
    """
    if family == "gaussian":
        # e^x - 1 - x with x = 2/d log(1 + ε), in digits that do not cancel
        x = 2 / dimensions * math.log1p(clip_range)
        return dimensions / 2 * (math.expm1(x) - x if x > 1e-4 else x * x * (1 / 2 + x / 6))
    gain = math.expm1(math.log1p(clip_range) / dimensions)
    if gain >= 1:
        raise ValueError(f"clip_range={clip_range:g} must be less than {2**dimensions - 1}, unless delta is given")
    return -dimensions / 2 * math.log1p(-(gain**2))


def policy_ratio_bounds(
    family: str, parameters: Parameters, actions: th.Tensor, clip_range: float, delta: float | None
) -> tuple[th.Tensor, th.Tensor]:
    """
    Smallest and largest ratio of actions, for a distribution π_old of a policy of SB3 or sb3-contrib.

    :param family: ``"gaussian"``, ``"categorical"`` or ``"bernoulli"``
    :param parameters: of π_old at each sample, as :func:`sb3_klip.divergence.parameters_of` returns them
    :param actions: sampled actions, for a Gaussian before any tanh; shape (N, d) or (N,)
    :param clip_range: half-width ε
    :param delta: δ in nats; None for :func:`default_delta`
    :return: lower and upper bound, each of shape (N,)
    :raises ValueError: if there is no default for δ, see :func:`default_delta`
    """
    if delta is None:
        delta = default_delta(family, clip_range, actions[0].numel())
    if family == "gaussian":
        mean, std = (parameter.double() for parameter in parameters)
        return gaussian_ratio_bounds((actions.double() - mean) / std, delta)
    if family == "bernoulli":
        (logits,) = parameters
        prob = (logits.double() * (2 * actions.double() - 1)).sigmoid()
    else:
        columns = actions.long().reshape(len(actions), len(parameters)).split(1, dim=1)
        probs = [logits.double().softmax(dim=-1).gather(-1, a) for logits, a in zip(parameters, columns, strict=True)]
        prob = th.cat(probs, dim=-1)
    return factored_ratio_bounds(prob, delta)


def _solved(divergence: Divergence, log_ratio: LogRatio, pole: th.Tensor, delta: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Ratios at the two roots of KL = δ.

    With u from 0 to infinity, t is p u on the upper side and ``-p u / (1 + u)`` on the lower side, where p is the least pole:
    -p is the t at which ``v = 1 + t / pole`` vanishes; ``1 + t`` and v are written so that they keep their digits there.

    :param pole: t / (v - 1) in each dimension, shape (..., d)
    :param delta: δ in nats
    """
    least = pole.min(dim=-1, keepdim=True).values
    share = least / pole

    def upper(u: th.Tensor) -> tuple[th.Tensor, ...]:
        t = least * u
        return t, 1 + t, 1 + u * share, t

    def lower(u: th.Tensor) -> tuple[th.Tensor, ...]:
        t = -least * u / (1 + u)
        return t, (1 + u * (1 - least)) / (1 + u), (1 + u * (1 - share)) / (1 + u), t / (1 + u)

    def ratio(side: Callable[..., Any]) -> th.Tensor:
        _, total, v, _ = side(_root(divergence, side, least, delta))
        return log_ratio(total, v).exp()

    return ratio(lower), ratio(upper)


def _root(divergence: Divergence, side: Callable[..., Any], least: th.Tensor, delta: float) -> th.Tensor:
    """
    The u where KL = δ: Newton's method for log KL over log u, which is nearly a line, with bisection where that fails.

    As 1/t is the multiplier of the constraint, ``dKL/dt = t d(log ratio)/dt``.

    :param side: of u, gives t, 1 + t, v, and dt / d(log u)
    """
    # Near t = 0, KL is half of t² times the slope of the log ratio, which is 0 where π_old is certain of the action.
    _, slope = divergence(th.zeros_like(least), th.ones_like(least), th.ones_like(least))
    start = (2 * delta / slope.clamp(min=1e-300)).sqrt().unsqueeze(-1) / least
    x, low, high = th.zeros_like(slope), *(th.full_like(slope, end) for end in RANGE)
    for _ in range(ITERATIONS):
        t, total, v, change = side(start * x.exp().unsqueeze(-1))
        kl, slope = divergence(t, total, v)
        low, high = th.where(kl > delta, low, x), th.where(kl > delta, x, high)
        newton = x - (kl / delta).log() * kl / (slope * (t * change).squeeze(-1))
        # A step that is NaN, as where KL is 0 everywhere, is not inside.
        x = th.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    return start * x.exp().unsqueeze(-1)
